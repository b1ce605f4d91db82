"""One thread for torch: beside other busy processes its threads wait for each other (1000 x)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
