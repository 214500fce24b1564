"""All cases, in the order of the speed table."""

from bench import (
    cases_adapt,
    cases_batched,
    cases_consolidate,
    cases_fisher,
    cases_forward,
    cases_import,
    cases_merge,
    cases_nf4,
    cases_pool_adapt,
    cases_sona,
)

CASES = (
    *cases_forward.CASES,
    *cases_adapt.CASES,
    *cases_batched.CASES,
    *cases_pool_adapt.CASES,
    *cases_nf4.CASES,
    *cases_fisher.CASES,
    *cases_consolidate.CASES,
    *cases_sona.CASES,
    *cases_merge.CASES,
    *cases_import.CASES,
)
