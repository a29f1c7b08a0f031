"""What `python -m tools.NAME` runs."""

import signal
import sys

# While `python -m` is looking for the tool: Ctrl-C during its slow imports ends the process without
# a traceback. cli.run answers it from then on.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
