"""The most products a second that a device is made for, in bfloat16."""

# Kind of device, as it begins: dense FLOP/s, from the makers' data sheets.
PEAKS = {
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA A100": 312e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,  # v5p, which is also "TPU v5p".
  "TPU v6": 918e12,
}


def flops_per_second(kind: str) -> float | None:
  """Of a device of this kind; None: unknown here."""
  return next((v for k, v in PEAKS.items() if kind.startswith(k)), None)
