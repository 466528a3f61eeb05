"""The stages of a run. Each is one function from plain data to plain data that runs as a job in a process of its own,
reads the files of earlier stages and writes new ones under the folder that it is given."""
