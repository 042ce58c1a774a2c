"""The digests of edits.py; `python -m fast.renew` tests and renews them."""
WRITTEN_FOR = {
    "decoder": {
        "models.Attention": "0a4c5d725f780f53",
        "models.DecoderWithAttention": "75d815510ec5a857"
    },
    "encoder": {
        "backbones.load_resnet": "9135c64c2af8fc07",
        "models.Encoder": "b9f99e343a72ff2a",
        "models.backbone": "7f1e6855dcfc867a"
    }
}
