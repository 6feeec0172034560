# SPDX-License-Identifier: Apache-2.0
"""A small image: Debian's static busybox."""

import gzip
import hashlib
import io
import json
import pathlib
import tarfile

APPLETS = "sh cat id ls sleep dd stat yes head httpd wget mkdir seq echo true false kill nc test touch".split()


def busybox_image(path: pathlib.Path, extra=()):
    """An OCI layout in a tar archive whose one layer is Debian's static busybox (image-spec v1.1)."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add("/bin/busybox", "bin/busybox")
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for folder in ("tmp", "home/user", "etc"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, text in dict(extra).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    raw = layer.getvalue()
    archive(path, gzip.compress(raw, 1), hashlib.sha256(raw).hexdigest())


def archive(path: pathlib.Path, layer: bytes, diff_id: str):
    """An OCI layout in a tar archive with one layer, packed by gzip; `diff_id`: the digest of what it holds, in hex."""
    archive_of(path, [(layer, "layer.v1.tar+gzip", diff_id)])


def archive_of(path: pathlib.Path, layers, name=None):
    """An OCI layout in a tar archive (image-spec v1.1). `layers`: content, kind and diff_id of each; `name`: what the archive calls its
    image."""
    blobs = {}

    def blob(data, kind):
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    diff_ids = [f"sha256:{diff_id}" for _, _, diff_id in layers]
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": blob(json.dumps(config).encode(), "config.v1+json"),
                "layers": [blob(data, kind) for data, kind, _ in layers]}
    described = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    if name is not None:
        described["annotations"] = {"org.opencontainers.image.ref.name": name}
    index = {"schemaVersion": 2, "manifests": [described]}
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode()}
    files |= {f"blobs/sha256/{digest}": data for digest, data in blobs.items()}
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
