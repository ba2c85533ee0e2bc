/* A wire between two network namespaces, in user space: what netem does, where the kernel has none.
 *
 *     wire NAMESPACE DEVICE NAMESPACE DEVICE [KEY=VALUE ...]
 *
 * NAMESPACE is a file, DEVICE the name of the TUN device that is made in it. The caller gives the devices their
 * addresses, and queues that drop nothing: the queue is the wire's. Both directions are alike, and each has a queue of
 * its own. The keys:
 *
 *     rate=MBIT      how fast packets are put on the wire, one after another (1000)
 *     delay=MS       how long each then takes to the other end (0)
 *     queue=MS       a packet that would wait longer than that to be put on the wire is dropped (100)
 *     loss=PERCENT   of the packets that were put on the wire, at random (0)
 *     burst=PACKETS  how many are lost in a row, on average (1: each for itself)
 *     mtu=BYTES      of both devices (1500)
 *     seed=NUMBER    of the random numbers (1)
 *     open=PORT,...  a firewall: TCP from or to no other port gets through (all do)
 *     trace=FILE     a line for each packet: see `trace`
 *
 * "up" is printed when the devices are there. A line KEY=VALUE on stdin changes `loss`, `burst` or `open`. To each line
 * of stdin, an empty one too, the answer is a line of JSON with what both directions have carried, lost, dropped and
 * blocked. The wire ends with its stdin.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 1 << 16, BATCH = 64, PORTS = 8, TCP = 6, UDP = 17 };
enum fate { CARRIED, LOST, DROPPED, BLOCKED, FATES };
static const char *const FATE[] = {"carried", "lost", "dropped", "blocked"};

static struct {
    double rate, delay, queue, loss, burst;
    int mtu, ports, open[PORTS];
    uint64_t seed;
    FILE *trace;
} wire = {.rate = 1000, .queue = 100, .burst = 1, .mtu = 1500, .seed = 1};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of `wire` and of all counters */

struct packet {
    int64_t due;
    int length;
    unsigned char *bytes;
};

struct direction {
    int number, in, out;
    struct packet *ring;
    unsigned first, end; /* of what is under way: they only grow */
    int64_t free_at;     /* when the last packet will have been put on the wire */
    uint64_t random;
    int losing;
    uint64_t packets[FATES], bytes[FATES];
};

/* What a firewall and a trace look at. */
struct header {
    int protocol, source, target, flags, payload;
};

static void die(const char *what) {
    fprintf(stderr, "wire: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static double chance(uint64_t *state) { /* xorshift64 */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (double)(*state >> 11) / (double)(UINT64_C(1) << 53);
}

static struct header look(const unsigned char *p, int length) {
    struct header h = {0};
    if (length < 20 || p[0] >> 4 != 4) return h;
    int at = (p[0] & 15) * 4;
    h.protocol = p[9];
    if (length < at + 20 && (h.protocol != UDP || length < at + 8)) return h;
    if (h.protocol != TCP && h.protocol != UDP) return h;
    h.source = p[at] << 8 | p[at + 1];
    h.target = p[at + 2] << 8 | p[at + 3];
    h.flags = h.protocol == TCP ? p[at + 13] : 0;
    h.payload = length - at - (h.protocol == TCP ? (p[at + 12] >> 4) * 4 : 8);
    return h;
}

static int blocked(const struct header *h) {
    if (!wire.ports || h->protocol != TCP) return 0;
    for (int i = 0; i < wire.ports; i++)
        if (h->source == wire.open[i] || h->target == wire.open[i]) return 0;
    return 1;
}

/* Each packet for itself; or, for bursts, two states, so that bursts have the length that was asked for and the share of
 * lost packets is `loss`. */
static int is_lost(struct direction *d) {
    double loss = wire.loss / 100;
    if (wire.burst <= 1) return chance(&d->random) < loss;
    double begin = loss < 1 ? loss / wire.burst / (1 - loss) : 1;
    d->losing = d->losing && loss < 1 ? chance(&d->random) >= 1 / wire.burst : chance(&d->random) < begin;
    return d->losing;
}

/* The direction, when the packet came and when it is due at the other end (ns), its length and what became of it; its
 * protocol, ports, TCP flags and bytes of payload. */
static void trace(const struct direction *d, int64_t came, int64_t due, int length, enum fate fate, struct header h) {
    fprintf(wire.trace, "%d %lld %lld %d %s %d %d %d %d %d\n", d->number, (long long)came, (long long)due, length,
            FATE[fate], h.protocol, h.source, h.target, h.flags, h.payload);
}

static void take(struct direction *d, const unsigned char *bytes, int length) {
    int64_t came = now(), due = 0;
    struct header header = look(bytes, length);
    enum fate fate = CARRIED;
    pthread_mutex_lock(&lock);
    int64_t start = d->free_at > came ? d->free_at : came;
    if (blocked(&header)) {
        fate = BLOCKED;
    } else if ((double)(start - came) > wire.queue * 1e6 || d->end - d->first == SLOTS) {
        fate = DROPPED;
    } else {
        d->free_at = start + (int64_t)(length * 8000.0 / wire.rate);
        due = d->free_at + (int64_t)(wire.delay * 1e6);
        if (is_lost(d)) fate = LOST;
    }
    d->packets[fate]++;
    d->bytes[fate] += (uint64_t)length;
    if (wire.trace) trace(d, came, due, length, fate, header);
    pthread_mutex_unlock(&lock);
    if (fate != CARRIED) return;
    struct packet *p = &d->ring[d->end % SLOTS];
    if (!p->bytes && !(p->bytes = malloc((size_t)wire.mtu))) die("memory");
    memcpy(p->bytes, bytes, (size_t)length);
    p->length = length;
    p->due = due;
    d->end++;
}

__attribute__((noreturn)) static void *carry(void *argument) {
    struct direction *d = argument;
    prctl(PR_SET_TIMERSLACK, 1000);
    unsigned char *buffer = malloc((size_t)wire.mtu);
    if (!buffer) die("memory");
    for (;;) {
        for (; d->first != d->end && d->ring[d->first % SLOTS].due <= now(); d->first++) {
            struct packet *p = &d->ring[d->first % SLOTS];
            if (write(d->out, p->bytes, (size_t)p->length) < 0 && errno != EIO) die("write"); /* EIO: it is down */
        }
        struct timespec left, *wait = NULL;
        if (d->first != d->end) {
            int64_t ns = d->ring[d->first % SLOTS].due - now();
            if (ns < 0) ns = 0;
            left = (struct timespec){ns / 1000000000, ns % 1000000000};
            wait = &left;
        }
        struct pollfd ready = {.fd = d->in, .events = POLLIN};
        if (ppoll(&ready, 1, wait, NULL) <= 0) continue;
        for (int i = 0; i < BATCH; i++) {
            ssize_t length = read(d->in, buffer, (size_t)wire.mtu);
            if (length <= 0) break;
            take(d, buffer, (int)length);
        }
    }
}

static int open_device(const char *namespace, const char *name) {
    int file = open(namespace, O_RDONLY | O_CLOEXEC);
    if (file < 0 || setns(file, CLONE_NEWNET) < 0) die(namespace);
    close(file);
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (device < 0) die("/dev/net/tun");
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (ioctl(device, TUNSETIFF, &request) < 0) die(name);
    int any = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    request.ifr_mtu = wire.mtu;
    if (ioctl(any, SIOCSIFMTU, &request) < 0) die("mtu");
    close(any);
    return device;
}

/* Take KEY=VALUE; 0 if it is none. `later` says that the wire is up. */
static int set(const char *text, int later) {
    const char *value = strchr(text, '=');
    if (!value) return 0;
    size_t length = (size_t)(value++ - text);
#define IS(key) (length == strlen(key) && !strncmp(text, key, length))
    if (IS("loss")) wire.loss = atof(value);
    else if (IS("burst")) wire.burst = atof(value);
    else if (IS("open")) {
        wire.ports = 0;
        for (const char *p = value; p && *p && wire.ports < PORTS; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL)
            wire.open[wire.ports++] = atoi(p);
    } else if (later) return 0;
    else if (IS("rate")) wire.rate = atof(value);
    else if (IS("delay")) wire.delay = atof(value);
    else if (IS("queue")) wire.queue = atof(value);
    else if (IS("mtu")) wire.mtu = atoi(value);
    else if (IS("seed")) wire.seed = strtoull(value, NULL, 10);
    else if (IS("trace")) {
        if (!(wire.trace = fopen(value, "w"))) die(value);
    } else return 0;
    return 1;
}

static void answer(const struct direction *directions) {
    putchar('[');
    for (int i = 0; i < 2; i++) {
        printf(i ? ", {" : "{");
        for (int f = 0; f < FATES; f++)
            printf("%s\"%s\": [%llu, %llu]", f ? ", " : "", FATE[f], (unsigned long long)directions[i].packets[f],
                   (unsigned long long)directions[i].bytes[f]);
        putchar('}');
    }
    puts("]");
    fflush(stdout);
}

int main(int count, char **arguments) {
    if (count < 5) {
        fprintf(stderr, "usage: wire NAMESPACE DEVICE NAMESPACE DEVICE [KEY=VALUE ...]\n");
        return 2;
    }
    for (int i = 5; i < count; i++)
        if (!set(arguments[i], 0)) {
            fprintf(stderr, "wire: unknown: %s\n", arguments[i]);
            return 2;
        }
    int devices[2];
    for (int i = 0; i < 2; i++) devices[i] = open_device(arguments[1 + 2 * i], arguments[2 + 2 * i]);
    static struct direction directions[2];
    for (int i = 0; i < 2; i++) {
        struct direction *d = &directions[i];
        *d = (struct direction){.number = i, .in = devices[i], .out = devices[1 - i]};
        d->random = (wire.seed * 2 + (uint64_t)i + 1) * UINT64_C(0x9E3779B97F4A7C15);
        if (!(d->ring = calloc(SLOTS, sizeof(struct packet)))) die("memory");
        pthread_t thread;
        if (pthread_create(&thread, NULL, carry, d)) die("thread");
    }
    puts("up");
    fflush(stdout);
    char line[256];
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        pthread_mutex_lock(&lock);
        int known = !*line || set(line, 1);
        if (wire.trace) fflush(wire.trace);
        if (known) answer(directions);
        pthread_mutex_unlock(&lock);
        if (!known) {
            fprintf(stderr, "wire: can't be changed: %s\n", line);
            return 2;
        }
    }
    pthread_mutex_lock(&lock); /* for good: nothing is traced while the file is closed */
    if (wire.trace) fclose(wire.trace);
    return 0;
}
