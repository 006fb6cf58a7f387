"""DivPrune (arXiv 2503.02175): greedy max-min diversity in cosine distance. Written from the paper's
Algorithm 1.

Departures:
- Similarities are float32; the released code uses the model's float16.
- Picked tokens are masked. The released code relies on a picked token's distance of about 0 to itself, with which
  duplicates of the token tie.
- A zero token has cosine 0 to everything instead of NaN.
"""

import torch
from torch import Tensor

from otprune.greedy import greedy_max_min
from otprune.kernel import compute_dtype, forms_kernel, gram, image_by_image_on_cpu
from otprune.methods.base import Selector

BLOCK = 512  # rows of cosines that the search for the first pick holds at once


@image_by_image_on_cpu
def divprune(features_BND: Tensor, k: int) -> Tensor:
    """Token indices int64 [B, k] in the order picked.

    The first pick is the token farthest from its nearest neighbour; every later one is farthest from the picked tokens.
    d_ij = 1 - cos(v_i, v_j). O(N^2 D + N k) time, O(N D + N^2) memory an image; for long images (`kernel.forms_kernel`)
    O(N (N + k) D) time and O(N D) memory. Ties go to the lowest index.
    """
    tokens_BND = torch.nn.functional.normalize(features_BND.to(compute_dtype(features_BND)), dim=-1)
    if not forms_kernel(tokens_BND.shape[1]):
        return greedy_max_min(tokens_BND, _nearest_distance(tokens_BND), k)
    distance_BNN = 1 - gram(tokens_BND)
    distance_BNN.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    picks_BK = torch.empty(features_BND.shape[0], k, dtype=torch.int64, device=features_BND.device)
    image_B = torch.arange(features_BND.shape[0], device=features_BND.device)

    nearest_BN = distance_BNN.amin(dim=-1)
    picks_BK[:, 0] = nearest_BN.argmax(dim=-1)
    nearest_BN = distance_BNN.new_full(nearest_BN.shape, torch.inf)
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


METHOD = Selector(name="divprune", choose=divprune, cost=_cost)
