/*
 * blocks: writes numbered blocks to disks and knows what must be in each.
 *
 *   blocks run DISK RAW   mount DISK (ext4, made if it is empty) at /mnt, write to two files in it,
 *                         one by the page cache and one by O_DIRECT, and to the disk RAW by O_DIRECT
 *   blocks status         what the running one has done so far
 *   blocks check          have it stop for as long as it takes to read everything back
 *
 * Disks are named by their serial numbers. Block i is written as its generation g:
 * word k of it is mix(i, g, k). Which generation each block has, is in this program's
 * memory alone. If a snapshot of memory and disks is not of one instant, blocks are
 * older or newer than they must be, and check says so; it has the kernel forget
 * everything that is clean in its caches first. Generation 0 is what was there at the
 * beginning: zeros, or mix(i, 0, k) on a raw disk that has a base of such blocks.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { size = 4096, words = size / 8, count = 2048, targets = 3 };

struct target {
	const char *name, *path;
	int flags;
	int based; /* on an image of blocks */
	int fd;
	uint32_t gen[count];
	uint64_t wrong;
};

static struct target target[targets] = {
	{"cached", "/mnt/cached", O_RDWR | O_CREAT, 0, -1, {0}, 0},
	{"direct", "/mnt/direct", O_RDWR | O_CREAT | O_DIRECT, 0, -1, {0}, 0},
	{"raw", NULL, O_RDWR | O_DIRECT, 0, -1, {0}, 0},
};
static uint64_t writes, reads, holes, seed = 1;
static uint64_t *buf, *want;

static void die(const char *what)
{
	fprintf(stderr, "blocks: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t mix(uint64_t i, uint64_t g, uint64_t k)
{
	uint64_t z = (i << 40 | g << 12 | k) + 0x9e3779b97f4a7c15;
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static uint64_t chance(uint64_t n) { return mix(0, 0, seed++ * 7919) % n; }

static void block(uint64_t *b, const struct target *t, int i, uint32_t g)
{
	if (g == 0 && !t->based) {
		memset(b, 0, size);
		return;
	}
	for (int k = 0; k < words; k++)
		b[k] = mix(i, g, k);
}

/* check_block reads a block back. */
static void check_block(struct target *t, int i)
{
	ssize_t n = pread(t->fd, buf, size, (off_t)i * size);
	if (n < 0)
		die(t->name);
	memset((char *)buf + n, 0, size - n); /* behind the end of a file */
	block(want, t, i, t->gen[i]);
	reads++;
	if (memcmp(buf, want, size) != 0) {
		uint64_t g;
		for (g = 0; g < 1 << 22; g++)
			if (buf[0] == mix(i, g, 0))
				break;
		t->wrong++;
		printf("wrong: %s block %d has generation %" PRIu64 ", want %u\n", t->name, i, g, t->gen[i]);
		fflush(stdout);
	}
}

/* work writes a block, or makes a hole, and reads another one. */
static void work(void)
{
	struct target *t = &target[chance(targets)];
	int i = (int)chance(count);
	uint32_t g = (uint32_t)(writes + 1);
	if (t != &target[2] && chance(16) == 0) {
		if (fallocate(t->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)i * size, size) != 0)
			die("make a hole");
		t->gen[i] = 0;
		holes++;
	} else {
		block(buf, t, i, g);
		if (pwrite(t->fd, buf, size, (off_t)i * size) != size)
			die(t->name);
		t->gen[i] = g;
	}
	writes++;
	if (chance(64) == 0 && fdatasync(t->fd) != 0)
		die("fdatasync");
	check_block(t, (int)chance(count));
}

static uint64_t check_all(void)
{
	uint64_t wrong = 0;
	int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
	if (fd < 0 || write(fd, "3\n", 2) != 2)
		die("drop the caches");
	close(fd);
	for (int n = 0; n < targets; n++) {
		for (int i = 0; i < count; i++)
			check_block(&target[n], i);
		wrong += target[n].wrong;
	}
	return wrong;
}

/* device finds a disk by its serial number. */
static char *device(const char *serial)
{
	for (char c = 'a'; c <= 'z'; c++) {
		char path[64], got[32] = "";
		snprintf(path, sizeof path, "/sys/block/vd%c/serial", c);
		FILE *f = fopen(path, "r");
		if (f == NULL)
			continue;
		if (fgets(got, sizeof got, f) != NULL)
			got[strcspn(got, "\n")] = 0;
		fclose(f);
		if (strcmp(got, serial) == 0) {
			char *dev;
			if (asprintf(&dev, "/dev/vd%c", c) < 0)
				die("memory");
			return dev;
		}
	}
	fprintf(stderr, "blocks: no virtio disk has the serial number %s\n", serial);
	exit(1);
}

static void mount_disk(const char *dev)
{
	mkdir("/mnt", 0755);
	if (mount(dev, "/mnt", "ext4", 0, NULL) == 0)
		return;
	pid_t pid = fork();
	if (pid == 0) {
		execlp("mkfs.ext4", "mkfs.ext4", "-q", "-F", dev, NULL);
		_exit(127);
	}
	int status;
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0) {
		fprintf(stderr, "blocks: mkfs.ext4 %s failed\n", dev);
		exit(1);
	}
	if (mount(dev, "/mnt", "ext4", 0, NULL) != 0)
		die("mount");
}

static int control(struct sockaddr_un *at, socklen_t *length)
{
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (fd < 0)
		die("socket");
	memset(at, 0, sizeof *at);
	at->sun_family = AF_UNIX;
	strcpy(at->sun_path + 1, "violin-blocks"); /* an abstract name */
	*length = offsetof(struct sockaddr_un, sun_path) + 1 + strlen("violin-blocks");
	return fd;
}

static void run(const char *disk, const char *raw)
{
	struct sockaddr_un at;
	socklen_t length;
	int ear = control(&at, &length);
	if (posix_memalign((void **)&buf, size, size) != 0 || posix_memalign((void **)&want, size, size) != 0)
		die("memory");
	mount_disk(device(disk));
	target[2].path = device(raw);
	for (int n = 0; n < targets; n++) {
		target[n].fd = open(target[n].path, target[n].flags, 0644);
		if (target[n].fd < 0)
			die(target[n].path);
	}
	if (pread(target[2].fd, buf, size, 0) != size)
		die(target[2].path);
	target[2].based = buf[0] == mix(0, 0, 0);
	if (bind(ear, (struct sockaddr *)&at, length) != 0 || listen(ear, 8) != 0)
		die("listen");
	for (;;) {
		struct pollfd p = {ear, POLLIN, 0};
		work();
		if (poll(&p, 1, 1) <= 0)
			continue;
		int c = accept(ear, NULL, NULL);
		char order = 0;
		if (c < 0 || read(c, &order, 1) != 1) {
			close(c);
			continue;
		}
		uint64_t at_writes = writes;
		if (order == 'c')
			check_all();
		dprintf(c, "{\"writes\": %" PRIu64 ", \"holes\": %" PRIu64 ", \"reads\": %" PRIu64 ", \"wrong\": {\"cached\": %" PRIu64 ", \"direct\": %" PRIu64 ", \"raw\": %" PRIu64 "}}\n",
			at_writes, holes, reads, target[0].wrong, target[1].wrong, target[2].wrong);
		close(c);
	}
}

static void ask(const char *order)
{
	struct sockaddr_un at;
	socklen_t length;
	int fd = control(&at, &length);
	char answer[512];
	ssize_t n;
	if (connect(fd, (struct sockaddr *)&at, length) != 0)
		die("blocks does not run");
	if (write(fd, order, 1) != 1)
		die("ask");
	if ((n = read(fd, answer, sizeof answer)) <= 0)
		die("no answer");
	if (fwrite(answer, 1, (size_t)n, stdout) != (size_t)n)
		die("write");
}

int main(int argc, char **argv)
{
	if (argc == 4 && strcmp(argv[1], "run") == 0)
		run(argv[2], argv[3]);
	else if (argc == 2 && (strcmp(argv[1], "status") == 0 || strcmp(argv[1], "check") == 0))
		ask(argv[1]);
	else {
		fprintf(stderr, "usage: blocks run DISK RAW | status | check\n");
		return 2;
	}
	return 0;
}
