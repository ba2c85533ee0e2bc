#!/bin/sh
# network.sh up | down: two wires in the guest, each between two addresses of the one namespace.
#   va 10.8.0.1 --- vb 10.8.0.2    with soft-RoCE devices rxa and rxb on their ends
#   vc 10.8.1.1 --- vd 10.8.1.2    with soft-iWARP devices swa and swb, where the kernel has siw
# "up" may be called at any time: it makes what is missing, whatever a test has removed, set down or slowed.
set -eu
DEADLINE=30

if [ ! -e /run/guest/command ]; then
    echo "network.sh: refused: it changes this machine's routing, and this machine is no test guest" >&2
    exit 1
fi

now() { cut -d. -f1 /proc/uptime; }

# wait_for WHAT COMMAND...: until the command is true. The kernel has no one event for these states.
wait_for() {
    what=$1
    end=$(($(now) + DEADLINE))
    shift
    until "$@"; do
        if [ "$(now)" -ge "$end" ]; then
            echo "network.sh: $what: not so after $DEADLINE s" >&2
            rdma link show >&2
            ip -br addr show >&2
            exit 1
        fi
        sleep 0.05
    done
}

exists() { [ -e "/sys/class/infiniband/$1" ]; }
absent() { ! exists "$1"; }
active() { grep -q ACTIVE "/sys/class/infiniband/$1/ports/1/state" 2>/dev/null; }
# The address as a GID, which the kernel adds a while after the device.
has_gid() { grep -qi "$2" "/sys/class/infiniband/$1"/ports/1/gids/* 2>/dev/null; }
has_siw() { [ -d /sys/module/siw ]; }

# wire A B ADDRESS_A ADDRESS_B RULE: packets between the addresses leave by one end and come in by the other, although
# both are this machine's own. RULE numbers the rules and tables: RULE for A to B, RULE+1 back.
wire() {
    ip link show "$1" >/dev/null 2>&1 && ip link show "$2" >/dev/null 2>&1 || {
        ip link delete "$1" 2>/dev/null || ip link delete "$2" 2>/dev/null || :
        ip link add "$1" type veth peer name "$2"
    }
    end "$1" "$3"
    end "$2" "$4"
    towards "$1" "$3" "$4" "$2" "$5"
    towards "$2" "$4" "$3" "$1" "$(($5 + 1))"
}

# end LINK ADDRESS
end() {
    tc qdisc delete dev "$1" root 2>/dev/null || :
    ip address replace "$2/24" dev "$1"
    ip link set "$1" mtu 9000 up
    # Packets come in from an address of this machine's own; and only the link that has an address answers for it.
    echo 1 >"/proc/sys/net/ipv4/conf/$1/accept_local"
    echo 0 >"/proc/sys/net/ipv4/conf/$1/rp_filter"
    echo 1 >"/proc/sys/net/ipv4/conf/$1/arp_ignore"
}

# towards LINK FROM TO PEER RULE
towards() {
    ip rule delete pref "$5" 2>/dev/null || :
    ip rule add pref "$5" iif lo from "$2" to "$3" lookup "$5"
    ip route replace "$3" dev "$1" src "$2" table "$5"
    ip neighbour replace "$3" lladdr "$(cat "/sys/class/net/$4/address")" dev "$1" nud permanent
}

# device NAME TYPE LINK
device() {
    if ! rdma link show "$1/1" 2>/dev/null | grep -q "netdev $3 "; then
        # A device whose link was removed stays until the last process has closed it.
        if exists "$1"; then
            rdma link delete "$1" 2>/dev/null || :
            wait_for "the old device $1 is gone (does a process hold it open?)" absent "$1"
        fi
        rdma link add "$1" type "$2" netdev "$3"
    fi
}

up() {
    echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
    wire va vb 10.8.0.1 10.8.0.2 101
    if has_siw; then wire vc vd 10.8.1.1 10.8.1.2 103; fi
    # The rules above come to bear only before the rule for this machine's own addresses.
    ip rule show pref 200 | grep -q local || ip rule add pref 200 lookup local
    ip rule delete pref 0 2>/dev/null || :
    device rxa rxe va
    device rxb rxe vb
    if has_siw; then
        device swa siw vc
        device swb siw vd
    fi
    for name in rxa rxb swa swb; do
        if exists "$name"; then wait_for "device $name is ACTIVE" active "$name"; fi
    done
    wait_for "device rxa has the GID of 10.8.0.1" has_gid rxa ffff:0a08:0001
    wait_for "device rxb has the GID of 10.8.0.2" has_gid rxb ffff:0a08:0002
}

down() {
    for name in rxa rxb swa swb; do
        if exists "$name"; then rdma link delete "$name"; fi
    done
    for link in va vc; do
        ip link delete "$link" 2>/dev/null || :
    done
    ip rule show pref 0 | grep -q local || ip rule add pref 0 lookup local
    for pref in 101 102 103 104 200; do
        ip rule delete pref "$pref" 2>/dev/null || :
    done
}

case ${1:-} in
    up | down) "$1" ;;
    *)
        echo "usage: network.sh up | down" >&2
        exit 2
        ;;
esac
