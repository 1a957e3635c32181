"""torchrun, ending as the run did.

Its exit code is that of the rank that failed first (2: wrong input, 75: stopped with a checkpoint) or of the
signal (130: Ctrl-C), and no traceback of torchrun's own stands below the sentence that says why.
"""

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

try:
    run.main()
except ChildFailedError as failed:
    code = failed.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
except SignalException as told:
    sys.exit(128 + told.sigval)
