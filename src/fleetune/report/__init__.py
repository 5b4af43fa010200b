"""A run as one HTML page, runs in a terminal, a sweep as a table and a page."""
