"""What TensorRT says: relayed to the log, errors kept for the message of an exception."""

import logging
import sys

from reptrt.trt.binding import load
from reptrt.trt.messages import Messages
from tests.support.fake_tensorrt import FakeTensorrt


def test_messages_reach_the_log_and_errors_are_kept(monkeypatch, caplog):
    fake = FakeTensorrt("tensorrt-11.4.0.106")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    severity = fake.ILogger.Severity
    caplog.set_level(logging.DEBUG, "reptrt.tensorrt")

    with Messages(load("tensorrt")) as messages:
        messages.logger.log(severity.WARNING, "be careful")
        messages.logger.log(severity.ERROR, "Error Code 4:\n  the cause")
        messages.logger.log(severity.ERROR, "an echo [checkMacros.cpp::catchCudaError::250]")
    messages.logger.log(severity.ERROR, "of somebody else")

    assert messages.reason() == "Error Code 4: the cause"
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["be careful"]
    assert len(caplog.records) == 4


def test_one_logger_per_process(monkeypatch):
    """TensorRT ignores every logger after the first: a second one would hear nothing."""
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorrt("tensorrt-11.4.0.106"))
    assert Messages(load("tensorrt")).logger is Messages(load("tensorrt")).logger
