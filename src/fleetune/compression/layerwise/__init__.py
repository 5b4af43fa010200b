"""Solve linear layers block by block: Hessians, grids, the column loop and its driver."""
