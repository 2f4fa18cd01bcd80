FAMILY = "patch_loss"


def test_time(benchmark, quickest):
    benchmark(quickest)
