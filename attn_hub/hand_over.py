"""What a decode step hands over: a token to a store that counts its rows, and a query to the host."""

from torch import Tensor


def append_token(keys: Tensor, values: Tensor, lengths: Tensor, key: Tensor, value: Tensor) -> None:
    """Writes one token's key and value [B, 1, Hkv, D] behind the `lengths` [B, Hkv] rows of the stores, and counts it.

    keys, values: [B, Hkv, N, D] with contiguous rows, which have room; all tensors on one device, the same dtype. Where
    the row lies is read on the device, so that the call can be captured in a CUDA graph. Raises ValueError for shapes
    or dtypes that do not fit.
    """
    batch, kv_heads, _, head_dim = keys.shape
    shape = (batch, 1, kv_heads, head_dim)
    if not key.shape == value.shape == shape or keys.shape != values.shape or lengths.shape != (batch, kv_heads):
        raise ValueError(
            f"got key {list(key.shape)}, value {list(value.shape)}, lengths {list(lengths.shape)}, allowed for stores "
            f"{list(keys.shape)}: twice {list(shape)}, {[batch, kv_heads]}"
        )
    if len({keys.dtype, values.dtype, key.dtype, value.dtype}) > 1:
        raise ValueError(f"got {key.dtype} and {value.dtype}, allowed: the stores' {keys.dtype}")
    if keys.is_cuda:
        from attn_hub.kernels.hand_over import triton_append_token  # Triton only where it is used

        triton_append_token(keys, values, lengths, key, value)
        return
    at = lengths[..., None, None].long().expand(-1, -1, 1, head_dim)
    keys.scatter_(2, at, key.transpose(1, 2))
    values.scatter_(2, at, value.transpose(1, 2))
    lengths += 1


def post(source: Tensor, target: Tensor) -> None:
    """Copies `source` to `target`, on the CPU, contiguous and of as many numbers, converted to its type.

    For a CUDA source the target is pinned, and holds the numbers once the current stream has come as far; the call can
    be captured in a CUDA graph. Raises ValueError for a target that does not fit.
    """
    if target.device.type != "cpu" or target.numel() != source.numel() or not target.is_contiguous():
        raise ValueError(
            f"target: got {list(target.shape)} on {target.device} with strides {target.stride()}, allowed: "
            f"{source.numel()} numbers in CPU memory, contiguous"
        )
    if not source.is_cuda:
        target.view(-1).copy_(source.reshape(-1))
        return
    if not target.is_pinned():
        raise ValueError("target: got memory that is not pinned, allowed: pinned memory for a CUDA source")
    from attn_hub.kernels.hand_over import triton_post

    triton_post(source, target)
