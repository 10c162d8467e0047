"""Programs that embed a table of songs without this package, each as its libraries' own pages say; see `end_to_end`."""
