"""The commands with several actions, one file each."""
