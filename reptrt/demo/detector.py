"""The small YOLOv6 that is part of reptrt and finds the digits of `reptrt.demo.scenes`.

`tools/train_digit_detector.py` trained it, on digits and backgrounds that no other part sees.
"""

from pathlib import Path

from reptrt.sources.options import ArchitectureOptions

WEIGHTS = Path(__file__).with_name("digits_yolov6.pt")
ARCHITECTURE = ArchitectureOptions(
    widths=(8, 16, 32, 32, 32, 24, 24, 16, 24, 16, 24),
    blocks=(2, 2, 2, 1, 1, 1, 1, 1),
    num_classes=10,
)
INPUT_SIZE = (3, 96, 96)
