#!/usr/bin/env python3
"""Drives a microVM over its control socket, with nothing but Python's standard library.

Usage: alula serve --api-sock alula.sock < /dev/null &
       alula firmware > firmware
       python3 examples/client.py alula.sock firmware "cpus=2 memory=128 end=idle"
"""

import http.client
import json
import socket
import sys


class Refused(Exception):
    """What the monitor says of a request that it does not do."""


class Connection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path, timeout=60):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class MicroVM:
    """A microVM behind a control socket: docs/api.md has every request."""

    def __init__(self, path):
        self.path = path
        self.connection = Connection(path)

    def request(self, method, path, body=None):
        text = None if body is None else json.dumps(body)
        self.connection.request(method, path, text, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        content = answer.read()
        value = json.loads(content) if content else None
        if answer.status >= 300:
            raise Refused(f"{method} {path}: {value.get('fault_message', value)}")
        return value

    def events(self):
        """What has happened, and what happens from now on, until the monitor ends."""
        # The answer ends with the monitor: it has a connection of its own.
        connection = Connection(self.path, timeout=None)
        connection.request("GET", "/events")
        for line in connection.getresponse():
            yield json.loads(line)


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    path, kernel, words = sys.argv[1:]
    vm = MicroVM(path)
    vm.request("PUT", "/machine-config", {"vcpu_count": 2, "mem_size_mib": 128})
    vm.request("PUT", "/boot-source", {"kernel_image_path": kernel, "boot_args": words})
    try:
        vm.request("PUT", "/vsock", {"guest_cid": 1, "uds_path": "v.sock"})
    except Refused as refused:
        print(refused)
    vm.request("PUT", "/actions", {"action_type": "InstanceStart"})
    vm.request("PATCH", "/vm", {"state": "Paused"})
    print(vm.request("GET", "/")["state"])
    vm.request("PATCH", "/vm", {"state": "Resumed"})
    print("CPU time in microseconds:", vm.request("GET", "/metrics")["process"]["cpu_us"])
    for event in vm.events():
        print(event["event"])
        if event["event"] == "resumed":
            break


if __name__ == "__main__":
    main()
