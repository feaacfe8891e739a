"""Prompts by what they are about: embeddings, and clusters of them that are as fine for rare things as for common."""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rlhf_img.errors import RlhfImgError

_DIMENSIONS = 64
_FINE = 8
"""First clusters for each one that is wanted."""
_PART = 64
Vectors = npt.NDArray[np.float32]


def by_words(texts: Sequence[str]) -> Vectors:
    """Embeddings without a model, (N, D) of length 1: words and pairs of words, weighed by how telling they are
    (TF-IDF), in the 64 directions in which they differ most (latent semantic analysis)."""
    with_sklearn()
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(ngram_range=(1, 2), min_df=2 if len(texts) > _DIMENSIONS else 1, sublinear_tf=True)
    try:
        found = counts.fit_transform(texts)
    except ValueError as error:  # not one word that counts
        raise RlhfImgError(f"these prompts cannot be told apart by their words ({error}); give --model") from error
    most = min(_DIMENSIONS, min(found.shape) - 1)
    return _unit(TruncatedSVD(most, random_state=0).fit_transform(found) if most > 0 else found.toarray())


def by_encoder(
    encode: Callable[[Sequence[str]], Sequence[Tensor]], texts: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Vectors:  # fmt: skip
    """Embeddings by a model's own text encoder, (N, D) of length 1: the mean over a prompt's tokens of the fused
    features that the transformer reads, (L, D), which `encode` gives; less what all prompts have in common."""
    found = []
    for start in range(0, len(texts), _PART):
        part = encode(texts[start : start + _PART])
        found += [features.float().mean(dim=0).cpu().numpy() for features in part]
        progress(len(found), len(texts))
    means = np.stack(found)
    return _unit(means - means.mean(axis=0))


def cluster(vectors_ND: Vectors, count: int) -> npt.NDArray[np.int64]:
    """The cluster of each of N vectors, from 0 to at most `count` - 1, by k-means in two levels.

    Many small clusters first, then clusters of their centres, each centre counting once: so the second level follows
    what there is and not how often, and a rare theme gets clusters as a common one does (hierarchical k-means, Vo et
    al. 2024, arXiv 2405.15613). FAISS does it where it is installed, scikit-learn otherwise. No cluster
    is empty.

    Raises RlhfImgError if there are fewer vectors than clusters.
    """
    if not 1 <= count <= len(vectors_ND):
        raise RlhfImgError(f"{len(vectors_ND)} prompts cannot be divided into {count} clusters; give fewer --clusters")
    fine_N, centres = _kmeans(vectors_ND, min(len(vectors_ND), _FINE * count))
    coarse, _ = _kmeans(centres, min(count, len(centres)))
    _, labels_N = np.unique(coarse[fine_N], return_inverse=True)
    return labels_N.astype(np.int64)


def _kmeans(vectors: Vectors, count: int) -> tuple[npt.NDArray[np.int64], Vectors]:
    """The nearest centre of each vector, and the centres that have one."""
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        # It warns where there are few vectors a centre, which is meant here.
        found = faiss.Kmeans(vectors.shape[1], count, niter=25, seed=1, min_points_per_centroid=1, verbose=False)
        found.train(np.ascontiguousarray(vectors, np.float32))
        labels, centres = found.index.search(vectors, 1)[1][:, 0], found.centroids
    else:
        with_sklearn()
        from sklearn.cluster import MiniBatchKMeans

        found = MiniBatchKMeans(count, random_state=0, n_init=3, batch_size=4096).fit(vectors)
        labels, centres = found.labels_, found.cluster_centers_
    used, labels = np.unique(labels, return_inverse=True)
    return labels, np.asarray(centres[used], np.float32)


def with_sklearn() -> None:
    """Raises RlhfImgError if scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise RlhfImgError("clusters need scikit-learn, which is not installed: pip install 'rlhf-img[pool]'")


def _unit(vectors: npt.NDArray[np.floating]) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1.0), np.float32)


def typical_words(texts: Sequence[str], everything: Sequence[str], count: int = 4) -> list[str]:
    """Words that more of `texts` have than of `everything`, which contains them: a name for a cluster."""
    mine, common = _shares(texts), _shares(everything)
    rated = {word: share * np.log(share / common[word]) for word, share in mine.items() if share > common[word]}
    return sorted(rated, key=lambda word: (-rated[word], word))[:count]


def _shares(texts: Sequence[str]) -> dict[str, float]:
    """Which share of texts each word is in."""
    counts = Counter(word for text in texts for word in set(re.findall(r"\w+", text.lower())))
    return {word: n / len(texts) for word, n in counts.items()}
