"""What the ranks do one after the other is told once."""

import logging
from types import SimpleNamespace

import pytest

from forge.cluster.ranks import rank_0_first
from forge.errors import UsageError

logger = logging.getLogger("forge.somewhere")


@pytest.mark.parametrize(("is_main", "told"), [(True, ["two rows are left out", "broken"]), (False, ["broken"])])
def test_a_warning_that_rank_0_has_given_is_not_repeated(
    is_main: bool, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def work(error: Exception | None = None) -> int:
        logger.warning("two rows are left out")
        logger.error("broken")
        if error is not None:
            raise error
        return 3

    accelerator = SimpleNamespace(is_main_process=is_main)
    assert rank_0_first(accelerator, work) == 3  # type: ignore[arg-type]
    assert [record.message for record in caplog.records] == told
    with pytest.raises(UsageError):
        rank_0_first(accelerator, lambda: work(UsageError("bad rows")))  # type: ignore[arg-type]
    logger.warning("one more")
    assert caplog.records[-1].message == "one more"
