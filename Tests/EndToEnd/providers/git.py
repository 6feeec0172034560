#!/usr/bin/env python3
"""A stand-in for a platform's program that gives tokens for git: OWNER HOST ORGANISATION WORKSPACE in."""
import datetime
import json
import pathlib
import sys

owner, host, organisation, workspace = sys.argv[1:]
here = pathlib.Path(__file__).parent
lifetime = float((here / "lifetime").read_text()) if (here / "lifetime").exists() else 3600
end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=lifetime)
print(json.dumps({"Username": "x-access-token", "Password": f"CANARY-git-{organisation}-{owner}", "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ")}))
