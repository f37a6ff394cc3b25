"""The run folder: what a run leaves behind, and what it needs to go on."""
