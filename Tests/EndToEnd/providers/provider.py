#!/usr/bin/env python3
"""A stand-in for a platform's credential program: OWNER ROLE WORKSPACE in, credentials of a few seconds out (credential_process).
What it says is counted, and it fails or hangs while a file beside it tells it to."""
import datetime
import json
import pathlib
import subprocess
import sys

owner, role, workspace = sys.argv[1:]
here = pathlib.Path(__file__).parent
if (here / "refuse").exists():
    sys.exit(1)
if (here / "hang").exists():
    subprocess.run(["sleep", "1234"])
count = here / f"count-{workspace}-{role}"
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
lifetime = float((here / "lifetime").read_text()) if (here / "lifetime").exists() else 3600
end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=lifetime)
print(json.dumps({"Version": 1, "AccessKeyId": f"ASIA{role.upper()}{number:06}", "SecretAccessKey": f"CANARY-secret-{workspace}-{number}",
                  "SessionToken": f"CANARY-session-{workspace}-{number}", "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ")}))
