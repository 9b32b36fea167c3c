"""Is there a GPU? Printed as JSON by a process of its own, so that the caller holds no context."""

from __future__ import annotations

import json


def main() -> None:
    try:
        import torch
    except ImportError as error:
        print(json.dumps({"why_not": f"torch cannot be imported ({error})"}))
        return
    if torch.version.hip is not None:
        why = f"this torch, {torch.__version__}, is built for ROCm; the check is for CUDA"
        print(json.dumps({"why_not": why}))
    elif torch.cuda.is_available():
        print(json.dumps({"device": torch.cuda.get_device_name(0)}))
    else:
        built = torch.version.cuda or "no CUDA"
        why = f"torch.cuda.is_available() is False (torch {torch.__version__}, built for {built})"
        print(json.dumps({"why_not": why}))


if __name__ == "__main__":
    main()
