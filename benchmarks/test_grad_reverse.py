FAMILY = "grad_reverse"


def test_time(benchmark, quickest):
    benchmark(quickest)
