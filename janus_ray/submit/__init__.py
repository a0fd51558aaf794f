"""Running a job on a cluster from somewhere else: what is sent, under which name, and following it to its end."""
