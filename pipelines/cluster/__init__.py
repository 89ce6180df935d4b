"""What knows Ray: workers and their resources, jobs, the files that travel with them, serving, checks of nodes."""
