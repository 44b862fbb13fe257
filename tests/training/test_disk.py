"""One message about a full disk, and nothing after it."""

import errno
import logging

import pytest

from jaxmem.errors import JaxmemError
from jaxmem.training.disk import _is_news, disk_errors


def test_nothing_follows_the_message_of_a_full_disk(tmp_path, caplog):
    logger = logging.getLogger("asyncio")
    full = OSError(errno.ENOSPC, "No space left on device")
    try:
        with pytest.raises(JaxmemError, match="disk is full"), disk_errors(tmp_path):
            raise full
        logger.error("Future exception was never retrieved", exc_info=ValueError("closed"))
        logging.getLogger("absl").error("write failed", exc_info=full)
        logger.error("something else")
    finally:
        for name in ("asyncio", "absl"):
            logging.getLogger(name).removeFilter(_is_news)
    assert [record.message for record in caplog.records] == ["something else"]
