"""Accuracies of Ganin et al., JMLR 17 (2016), table 1, on Amazon reviews: by task, then by column."""

from __future__ import annotations

# DANN, network and SVM on the counts, then on mSDA's codes.
_TABLE = """
books dvd               .784 .790 .799  .829 .824 .830
books electronics       .733 .747 .748  .804 .770 .766
books kitchen           .779 .778 .769  .843 .842 .821
dvd books               .723 .720 .743  .825 .823 .826
dvd electronics         .754 .732 .748  .809 .768 .739
dvd kitchen             .783 .778 .746  .849 .853 .842
electronics books       .713 .709 .705  .774 .770 .762
electronics dvd         .738 .733 .726  .781 .759 .770
electronics kitchen     .854 .854 .847  .881 .863 .847
kitchen books           .709 .708 .707  .718 .721 .769
kitchen dvd             .740 .739 .736  .789 .789 .788
kitchen electronics     .843 .841 .842  .856 .850 .861
"""
_COLUMNS = [(codes, learner) for codes in ("counts", "msda") for learner in ("dann", "network", "svm")]

PUBLISHED: dict[tuple[str, str], dict[tuple[str, str], float]] = {
    (source, target): dict(zip(_COLUMNS, map(float, values), strict=True))
    for source, target, *values in (line.split() for line in _TABLE.strip().splitlines())
}
