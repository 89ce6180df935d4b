"""What a run needs before anybody pays for it: memory, bytes, FLOPs and hours, from shapes alone."""
