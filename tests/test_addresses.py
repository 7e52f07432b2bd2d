"""Addresses without their secrets: what is taken out, and what stays."""

import pytest

from gpt2x.addresses import without_secrets
from gpt2x.errors import UserError

HOST = "https://host.example/data/rows-00.jsonl"
ADDRESSES = {
    "password": ("https://user:PASS@host.example/data/rows-00.jsonl", HOST),
    "token for a user": ("https://PASS@host.example/data/rows-00.jsonl", HOST),
    "password with an at sign": ("https://user:PA@SS@host.example/data/rows-00.jsonl", HOST),
    "bucket": ("s3://KEY:PASS@bucket/rows.jsonl", "s3://bucket/rows.jsonl"),
    "S3, version 4": (
        f"{HOST}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=PASS%2F20260101&X-Amz-Date=20260101T000000Z"
        "&X-Amz-Expires=3600&X-Amz-SignedHeaders=host&X-Amz-Security-Token=PASS&X-Amz-Signature=PASS&versionId=7",
        f"{HOST}?versionId=7",
    ),
    "S3, version 2": (f"{HOST}?AWSAccessKeyId=PASS&Expires=1700000000&Signature=PASS", HOST),
    "Google": (f"{HOST}?GoogleAccessId=PASS&Expires=1&Signature=PASS&generation=3", f"{HOST}?generation=3"),
    "CloudFront": (f"{HOST}?Policy=PASS&Signature=PASS&Key-Pair-Id=PASS", HOST),
    "Azure": (f"{HOST}?sv=2024-11-04&se=2026-01-01&sr=b&sp=r&sig=PASS&snapshot=4", f"{HOST}?snapshot=4"),
    "no signature, Azure's names": (f"{HOST}?sp=3&st=4", f"{HOST}?sp=3&st=4"),
    "token": (f"{HOST}?part=1&token=PASS&access_token=PASS&page=2", f"{HOST}?part=1&page=2"),
    "spelt in hexadecimal": (f"{HOST}?%74oken=PASS", HOST),
    "in any case": (f"{HOST}?Token=PASS&API_KEY=PASS", HOST),
    "before a fragment": (f"{HOST}?token=PASS#rows", f"{HOST}#rows"),
    "in a chain": (
        "zip://a.jsonl::https://u:PASS@host.example/x.zip?token=PASS",
        "zip://a.jsonl::https://host.example/x.zip",
    ),
    "nothing secret": (
        f"{HOST}?max_tokens=4&design=a&author=b&tokenizer=c",
        f"{HOST}?max_tokens=4&design=a&author=b&tokenizer=c",
    ),
    "no address": ("data/?token=PASS@x", "data/?token=PASS@x"),
    "mail": ("write to me@host", "write to me@host"),
}


@pytest.mark.parametrize(("address", "public"), ADDRESSES.values(), ids=ADDRESSES)
def test_what_opens_an_address_is_taken_out_and_what_names_the_data_stays(address, public):
    assert without_secrets(address) == public
    assert without_secrets(public) == public


def test_addresses_are_found_in_a_text_and_in_plain_data():
    text = f"'{HOST}?token=PASS' cannot be read: 403, https://user:PASS@host.example/x: Forbidden (is it me@home?)"
    public = f"'{HOST}' cannot be read: 403, https://host.example/x: Forbidden (is it me@home?)"
    assert without_secrets(text) == public
    tree = {"a": [text, 1, None], "b": {"c": (text, 2.0)}}
    assert without_secrets(tree) == {"a": [public, 1, None], "b": {"c": (public, 2.0)}}


def test_a_complaint_to_the_user_tells_no_secret():
    assert str(UserError(f"{HOST}?token=PASS is missing; correct it.")) == f"{HOST} is missing; correct it."
