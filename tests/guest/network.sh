#!/bin/sh
# network.sh up | down: two wires in the guest, each between two addresses of the one namespace.
#   va 10.8.0.1 --- vb 10.8.0.2    with soft-RoCE devices rxa and rxb on their ends
#   vc 10.8.1.1 --- vd 10.8.1.2    with soft-iWARP devices swa and swb, where the kernel has siw
# "up" may be called at any time: it makes what is missing, whatever a test has removed, set down or slowed.
# Starting a process is slow on an emulated CPU: hence batches, and shell built-ins instead of cat and grep.
set -eu
DEADLINE=$((6 * ${RDMA_TEST_PATIENCE:-5})) # seconds
infiniband=/sys/class/infiniband

if [ ! -e /run/guest/command ]; then
    echo "network.sh: refused: it changes this machine's routing, and this machine is no test guest" >&2
    exit 1
fi

# wait_for WHAT COMMAND...: until the command is true. The kernel has no one event for these states.
wait_for() {
    what=$1
    shift
    read -r now _ </proc/uptime
    end=$((${now%.*} + DEADLINE))
    until "$@"; do
        read -r now _ </proc/uptime
        if [ "${now%.*}" -ge "$end" ]; then
            echo "network.sh: $what: not so after $DEADLINE s" >&2
            rdma link show >&2
            ip -br address show >&2
            exit 1
        fi
        sleep 0.05
    done
}

is_gone() { [ ! -e "$infiniband/$1" ]; }

# contains TEXT FILE...: any of the files.
contains() {
    text=$1
    shift
    for file; do
        if read -r line 2>/dev/null <"$file"; then
            case $line in *"$text"*) return 0 ;; esac
        fi
    done
    return 1
}

# wire A B NET RULE: packets from NET.1 to NET.2 leave by link A and come in by link B, although both addresses are
# this machine's own. RULE numbers the rule and the routing table for that, RULE + 1 those for the way back.
wire() {
    near=02:00:00:00:$(($4 % 100)):01
    far=02:00:00:00:$(($4 % 100)):02
    if [ -e "/sys/class/net/$1" ] && [ -e "/sys/class/net/$2" ]; then
        printf 'qdisc delete dev %s root\n' "$1" "$2" | tc -force -batch - 2>/dev/null || : # most often there is none
    else
        printf 'link delete %s\n' "$1" "$2" | ip -force -batch - 2>/dev/null || :
        ip link add "$1" address "$near" type veth peer name "$2" address "$far"
    fi
    for link in "$1" "$2"; do
        # Packets come in from an address of this machine's own; and only the link that has an address answers for it.
        echo 1 >"/proc/sys/net/ipv4/conf/$link/accept_local"
        echo 0 >"/proc/sys/net/ipv4/conf/$link/rp_filter"
        echo 1 >"/proc/sys/net/ipv4/conf/$link/arp_ignore"
    done
    {
        towards "$1" "$3.1" "$3.2" "$far" "$4"
        towards "$2" "$3.2" "$3.1" "$near" "$(($4 + 1))"
    } | ip -batch -
}

# towards LINK FROM TO MAC RULE: commands for ip.
towards() {
    echo "address replace $2/24 dev $1"
    echo "link set $1 mtu 9000 up"
    case $rules in *"$5:"*) ;; *) echo "rule add pref $5 iif lo from $2 to $3 lookup $5" ;; esac
    echo "route replace $3 dev $1 src $2 table $5"
    echo "neighbour replace $3 lladdr $4 dev $1 nud permanent"
}

# device NAME TYPE LINK
device() {
    case $devices in
        *"link $1/1 "*"netdev $3 "*) return ;;
        *"link $1/1 "*)
            # Its link was removed. It stays until the last process has closed it.
            rdma link delete "$1" 2>/dev/null || :
            wait_for "the old device $1 is gone (is it still open in a process?)" is_gone "$1"
            ;;
    esac
    rdma link add "$1" type "$2" netdev "$3"
}

up() {
    rules=$(ip rule show)
    echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
    wire va vb 10.8.0 101
    if [ -d /sys/module/siw ]; then wire vc vd 10.8.1 103; fi
    # The rules of the wires count only if they come before the rule for the machine's own addresses.
    case $rules in *"200:"*) ;; *) ip rule add pref 200 lookup local ;; esac
    case $rules in "0:"*) ip rule delete pref 0 ;; esac
    devices=$(rdma link show)
    device rxa rxe va
    device rxb rxe vb
    if [ -d /sys/module/siw ]; then
        device swa siw vc
        device swb siw vd
    fi
    for name in rxa rxb swa swb; do
        if ! is_gone "$name"; then
            wait_for "device $name is ACTIVE" contains ACTIVE "$infiniband/$name/ports/1/state"
        fi
    done
    # The kernel adds the addresses as GIDs a while after it has added the device.
    wait_for "device rxa has the GID of 10.8.0.1" contains ffff:0a08:0001 "$infiniband"/rxa/ports/1/gids/*
    wait_for "device rxb has the GID of 10.8.0.2" contains ffff:0a08:0002 "$infiniband"/rxb/ports/1/gids/*
}

down() {
    for name in rxa rxb swa swb; do
        if ! is_gone "$name"; then rdma link delete "$name"; fi
    done
    rules=$(ip rule show)
    case $rules in "0:"*) ;; *) ip rule add pref 0 lookup local ;; esac
    { printf 'link delete %s\n' va vc && printf 'rule delete pref %s\n' 101 102 103 104 200; } |
        ip -force -batch - 2>/dev/null || :
}

case ${1:-} in
    up | down) "$1" ;;
    *)
        echo "usage: network.sh up | down" >&2
        exit 2
        ;;
esac
