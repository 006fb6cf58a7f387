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

from otprune.kernel import compute_dtype, gram, image_by_image_on_cpu
from otprune.methods.base import Selector


@image_by_image_on_cpu
def divprune(features_BND: Tensor, k: int) -> Tensor:
    """Token indices int64 [B, k] in the order picked.

    The first pick is the token farthest from its nearest neighbour; every later one is farthest from the picked tokens.
    d_ij = 1 - cos(v_i, v_j). O(N^2 D + N k) time, O(N D + N^2) memory an image. Ties go to the lowest index.
    """
    tokens_BND = torch.nn.functional.normalize(features_BND.to(compute_dtype(features_BND)), dim=-1)
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


METHOD = Selector(
    name="divprune",
    choose=divprune,
    cost=lambda num_tokens, width, kept, on_cpu: num_tokens**2 * width,  # the Gram matrix
)
