#!/usr/bin/python3
# A STAND-IN for RStudio Server's rserver, whose package is in no registry that the
# tests reach. It refuses to start unless it is called as the vendor documents, and
# then answers on its port. It proves the tool definition, not RStudio.
import http.server
import os
import sys

options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:] if argument.startswith("--") and "=" in argument)
expected = {"auth-none": "1", "server-daemonize": "0", "www-verify-user-agent": "0", "www-frame-origin": "same", "www-address": "0.0.0.0"}
for name, value in expected.items():
    if options.get(name) != value:
        sys.exit(f"--{name}: expected {value}, got {options.get(name)}")
if options["server-user"] != os.environ.get("USER"):
    sys.exit("with auth-none, USER must be the server's user")
key = options["secure-cookie-key-file"]
if os.stat(key).st_mode & 0o077 or len(open(key).read()) < 32:
    sys.exit("the key file is readable by others, or too short")
os.makedirs(options["server-data-dir"], mode=0o700)
if not options["database-config-file"].startswith("/"):
    sys.exit("database-config-file: expected a path")


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"stand-in for RStudio")


http.server.HTTPServer((options["www-address"], int(options["www-port"])), Page).serve_forever()
