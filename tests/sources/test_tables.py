"""The tables are those that their packages load themselves."""

import numpy as np
from matplotlib import cbook
from mlxtend.data import autompg_data
from sklearn.datasets import load_breast_cancer

from implementations.sources.tables import cars, google, tumours


def test_tumours_are_scikit_learns():
    features, benign = tumours()
    theirs = load_breast_cancer()
    np.testing.assert_array_equal(features, theirs.data)
    np.testing.assert_array_equal(benign, theirs.target)


def test_cars_are_mlxtends():
    """Its table has the columns cylinders, displacement, power, weight, acceleration, year, ..."""
    table, (theirs, miles) = cars(), autompg_data()
    np.testing.assert_array_equal(table.weight, theirs[:, 3])
    np.testing.assert_array_equal(table.year, theirs[:, 5])
    np.testing.assert_array_equal(table.miles, miles)


def test_makes_are_spelled_in_one_way():
    """28 makes; by hand from the table: 43 + 3 + 1 Chevrolets, 15 + 6 + 1 Volkswagens."""
    table = cars()
    counts = dict(zip(table.names, np.bincount(table.make), strict=True))
    assert len(counts) == 28
    assert counts["chevrolet"] == 47
    assert counts["volkswagen"] == 22
    assert sum(counts.values()) == 392


def test_google_is_matplotlibs():
    with cbook.get_sample_data("goog.npz") as theirs:
        prices = theirs["price_data"]
    np.testing.assert_array_equal(google(), prices["close"])
    assert str(prices["date"][-1]) == "2008-10-14"
