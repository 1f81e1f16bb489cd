"""The certificate with which the service speaks https."""

from __future__ import annotations

import ssl
from pathlib import Path

from tightfit.runtime.common.errors import InputError


def server_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """What speaks TLS with a certificate and its key, which lies in a file of its own or in the certificate's.

    Raises InputError for files that cannot be read, or that do not hold the two in PEM.
    """
    options = f"--certificate {certificate}" if key is None else f"--certificate {certificate} --key {key}"
    for option, path in (("--certificate", certificate), ("--key", key)):
        if path is not None and not path.is_file():
            raise InputError(f"{option} {path}: no such file; name a file in PEM")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password="")  # else OpenSSL would ask for one at the terminal
    except ssl.SSLError as error:
        raise InputError(
            f"{options}: no certificate and key in PEM that belong together and are not encrypted"
            f" ({error.reason or error}); docs/service.md says how to make them"
        ) from error
    except OSError as error:
        raise InputError(f"{options}: {error.strerror}; name files that can be read") from error
    return context
