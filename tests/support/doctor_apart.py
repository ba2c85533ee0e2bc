"""Two hosts' doctors, each in a network of its own, without a firewall between them and with one: doctor_apart.py
FOLDER SERVER_KIT SITE_KIT, in a network namespace in which this process may do all. What the site's doctor says each
time is in FOLDER/results.json."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path

from tests.support.namespaces import in_another_network, ip

SERVER, SITE, PORT = "10.9.0.1", "10.9.0.2", 8004
DOCTOR = [sys.executable, "-m", "nvflare_rdma.cli", "doctor"]
# Drops packets as a firewall does, without an answer, and needs no module of the kernel's.
FIREWALL = "rule {} pref 50 iif near ipproto tcp dport {} blackhole"
#: What is dropped -> how the site's doctor is called. A door that is never reached takes a while to be given up.
CASES = {"": "json", "20003-20010": "txt", str(PORT): "txt"}


def serve(folder: Path, server_kit: str, site_kit: str) -> int:
    with in_another_network(__file__, str(folder), server_kit, site_kit, "site") as site:
        assert site.stdin is not None
        assert site.stdout is not None
        ip(
            f"link add near type veth peer name far netns {site.pid}",
            f"address add {SERVER}/24 dev near",
            "link set near up",
            "link set lo up",
            "rule add pref 100 lookup local",  # for this machine's own addresses: the firewall comes before it
            "rule delete pref 0",
        )
        listening = [*DOCTOR, "--listen", str(PORT), "--kit", server_kit, "--timeout", "5m"]
        results: dict[str, dict] = {}
        with subprocess.Popen(listening, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as listener:
            assert listener.stdout is not None
            assert listener.stderr is not None
            assert "listens at" in listener.stderr.readline()
            for dropped, form in CASES.items():
                if dropped:
                    ip(FIREWALL.format("add", dropped))
                print(form, file=site.stdin, flush=True)
                results[dropped] = json.loads(site.stdout.readline())
                if dropped:
                    ip(FIREWALL.format("delete", dropped))
            listener.terminate()
            listened = {"out": listener.stdout.read(), "code": listener.wait(30)}
        site.stdin.close()
        (folder / "results.json").write_text(json.dumps({"peer": results, "listen": listened}))
        return site.wait(30)


def ask(site_kit: str) -> int:
    print("ready", flush=True)
    for line in sys.stdin:
        form = line.strip()
        ip(f"address replace {SITE}/24 dev far", "link set far up", "link set lo up")
        command = [*DOCTOR, "--peer", f"{SERVER}:{PORT}", "--kit", site_kit, "--format", form]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        print(json.dumps({"out": done.stdout, "err": done.stderr, "code": done.returncode}), flush=True)
    return 0


if __name__ == "__main__":
    status = 1
    try:
        status = ask(sys.argv[3]) if sys.argv[4:] == ["site"] else serve(Path(sys.argv[1]), *sys.argv[2:4])
    except BaseException:  # noqa: BLE001 - it is shown
        traceback.print_exc()
    sys.exit(status)
