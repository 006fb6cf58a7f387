"""DivPrune (arXiv 2503.02175): greedy max-min diversity in cosine distance. Written from the paper's
Algorithm 1.

Departures:
- Similarities are float32; the released code uses the model's float16, in which many distances tie. With
  `precision="released"` so do we (`half_precision`). test_half_precision.py
- Picked tokens are masked. The released code relies on a picked token's distance of about 0 to itself, with which
  duplicates of the token tie.
- A zero token has cosine 0 to everything instead of NaN.
"""

import torch
from torch import Tensor

from otprune import half_precision
from otprune.greedy import greedy_max_min
from otprune.kernel import compute_dtype, forms_kernel, gram, image_by_image_on_cpu
from otprune.methods.base import Selector
from otprune.methods.settings import PRECISION

BLOCK = 512  # rows of cosines that the search for the first pick holds at once


@image_by_image_on_cpu
def divprune(features_BND: Tensor, k: int, *, precision: str = "float32") -> Tensor:
    """Token indices int64 [B, k] in the order picked.

    The first pick is the token farthest from its nearest neighbour; every later one is farthest from the picked tokens.
    d_ij = 1 - cos(v_i, v_j). O(N^2 D + N k) time, O(N D + N^2) memory an image; for long images (`kernel.forms_kernel`)
    O(N (N + k) D) time and O(N D) memory. Ties go to the lowest index.

    Args:
        precision: float32 | released (`half_precision`), for images of which `kernel.forms_kernel` allows N x N
            matrices.

    Raises:
        ValueError: for longer images in the released precision.
    """
    if precision == "released":
        half_precision.check_length(features_BND)
        distance_BNN = half_precision.rounded(1 - half_precision.cosines(features_BND))
        # The second smallest of all distances: the smallest is about 0, the token's own.
        return _farthest(distance_BNN, distance_BNN.kthvalue(min(2, distance_BNN.shape[1]), dim=-1).values, k)
    tokens_BND = torch.nn.functional.normalize(features_BND.to(compute_dtype(features_BND)), dim=-1)
    if not forms_kernel(tokens_BND.shape[1]):
        return greedy_max_min(tokens_BND, _nearest_distance(tokens_BND), k)
    distance_BNN = 1 - gram(tokens_BND)
    distance_BNN.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return _farthest(distance_BNN, distance_BNN.amin(dim=-1), k)


def _farthest(distance_BNN: Tensor, nearest_BN: Tensor, k: int) -> Tensor:
    """The picks int64 [B, k]: first the token with the largest of `nearest_BN`, then those farthest from the picks."""
    picks_BK = torch.empty(len(nearest_BN), k, dtype=torch.int64, device=nearest_BN.device)
    image_B = torch.arange(len(nearest_BN), device=nearest_BN.device)
    picks_BK[:, 0] = nearest_BN.argmax(dim=-1)
    nearest_BN = torch.full_like(nearest_BN, torch.inf)
    for step in range(1, k):
        pick_B = picks_BK[:, step - 1]
        nearest_BN = torch.minimum(nearest_BN, distance_BNN[image_B, pick_B])
        nearest_BN[image_B, pick_B] = -torch.inf  # a token is picked once
        picks_BK[:, step] = nearest_BN.argmax(dim=-1)
    return picks_BK


def _nearest_distance(tokens_BND: Tensor) -> Tensor:
    """The distance [B, N] of each token to its nearest neighbour, from blocks of the cosines' upper triangle."""
    B, N, _ = tokens_BND.shape
    cosine_BN = tokens_BND.new_full((B, N), -torch.inf)
    for start in range(0, N, BLOCK):
        stop = start + BLOCK
        block_BMN = tokens_BND[:, start:stop] @ tokens_BND[:, start:].mT
        block_BMN.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)  # no token is its own neighbour
        cosine_BN[:, start:stop] = torch.maximum(cosine_BN[:, start:stop], block_BMN.amax(dim=-1))
        cosine_BN[:, start:] = torch.maximum(cosine_BN[:, start:], block_BMN.amax(dim=-2))
    return 1 - cosine_BN


def _cost(num_tokens: int, width: int, kept: int, on_cpu: bool) -> int:
    """Multiply-adds: N^2 D for the Gram matrix; long images, which compute it twice, add N D for each pick but the
    last."""
    num_rows = 0 if forms_kernel(num_tokens) else kept - 1
    return num_tokens * width * (num_tokens + num_rows)


METHOD = Selector(name="divprune", choose=divprune, cost=_cost, settings={"precision": PRECISION})
