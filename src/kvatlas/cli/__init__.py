"""The command line: arguments and wiring. What the commands do is done elsewhere.

app.py      all commands, and how failures are told
options.py  options that several commands share
columns.py  tables that fit a narrow screen
screen.py   tables, progress and errors for people; JSON lines for programs
client.py   HTTP requests to a running service
stopping.py Ctrl-C as a way to end
and a file for each command
"""

from kvatlas.cli.app import main

__all__ = ["main"]
