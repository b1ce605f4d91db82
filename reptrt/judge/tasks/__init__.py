"""The tasks of networks, one a file; `protocol` says what each of them does."""

from collections.abc import Callable, Mapping
from typing import Any

from reptrt.core.choices import TaskName
from reptrt.data.dataset import Images
from reptrt.judge.options import TaskOptions
from reptrt.judge.tasks.anything import Anything
from reptrt.judge.tasks.classify import Classify
from reptrt.judge.tasks.detect import Detect
from reptrt.judge.tasks.protocol import Task
from reptrt.judge.tasks.segment import Segment

_TASKS: Mapping[TaskName, Callable[[TaskOptions, Images], Task[Any]]] = {
    "classify": Classify,
    "detect": Detect,
    "segment": Segment,
    "any": Anything,
}


def open_task(options: TaskOptions, images: Images) -> Task[Any]:
    """Return the task that the options name, with its labels or annotations of the images.

    Raises:
        ReptrtError: annotations are missing or cannot be used.
    """
    return _TASKS[options.task](options, images)
