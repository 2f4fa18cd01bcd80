def test_time(benchmark, quickest):
    benchmark(quickest)
