#!/usr/bin/env python3
"""A stand-in for a platform's program that gives web identities: OWNER WORKSPACE in. Each is another."""
import datetime
import json
import pathlib
import sys

owner, workspace = sys.argv[1:]
here = pathlib.Path(__file__).parent
count = here / f"identities-{workspace}"
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
lifetime = float((here / "lifetime").read_text()) if (here / "lifetime").exists() else 3600
end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=lifetime)
print(json.dumps({"Token": f"CANARY-identity-{owner}-{number}", "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ")}))
