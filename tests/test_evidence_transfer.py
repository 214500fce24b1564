"""One lambda for other ranks and batches, in the delta form."""

from __future__ import annotations

import pytest
from helpers_evidence import FULL, quiet

from lora_engine.evidence import transfer

PROFILE = transfer.FULL if FULL else transfer.QUICK


@pytest.fixture(scope="module")
def result():
    with quiet() as progress:
        return transfer.run(progress, PROFILE)


def test_lambda_of_rank_2_and_single_samples_serves_the_others(result):
    assert transfer.check(result) == []


def test_lambda_matters(result):
    """So that to be near the best says something."""
    for accuracy in result.accuracy.values():
        assert accuracy[result.ewc_lambda] > accuracy[0.0] + 0.015


def test_what_is_lost_is_said():
    accuracy = {"rank 8": {0.0: 0.8, 1.0: 0.90, 10.0: 0.92}, "batch 32": {1.0: 0.9, 10.0: 0.9}}
    result = transfer.Result(1.0, {}, accuracy)
    assert result.lost("rank 8") == pytest.approx(0.02)
    assert result.lost("batch 32") == 0.0
    (said,) = transfer.check(result)
    assert said.startswith("rank 8")


def test_the_other_settings_differ_in_rank_or_batch_alone():
    rank, batch = transfer.OTHERS["rank 8"], transfer.OTHERS["batch 32"]
    assert rank == transfer.ORIGIN._replace(rank=8)
    assert (batch.form, batch.rank, batch.batch) == ("delta", 2, 32)
    assert (transfer.ORIGIN.rank, transfer.ORIGIN.batch) == (2, 1)
