/* A disk that fails, under one program: LD_PRELOAD this, and its writes and syncs do what a file says.
 *
 * DISK_FAULTS names the file, DISK_FAULTS_UNDER the directory whose files are on that disk. The file holds
 *     <milliseconds a sync takes> <errno of a sync> <errno of a write>
 * and may change at any time; 0 is a disk that is well. SQLite calls nothing else to write.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct faults {
    int sync_ms, sync_errno, write_errno;
};

/* Those for this file; a file elsewhere has none. */
static struct faults of(int fd) {
    struct faults found = {0, 0, 0};
    const char *name = getenv("DISK_FAULTS"), *under = getenv("DISK_FAULTS_UNDER");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!name || !under || length < 0)
        return found;
    path[length] = 0;
    if (strncmp(path, under, strlen(under)))
        return found;
    FILE *file = fopen(name, "re");
    if (file) {
        if (fscanf(file, "%d %d %d", &found.sync_ms, &found.sync_errno, &found.write_errno) != 3)
            memset(&found, 0, sizeof found);
        fclose(file);
    }
    return found;
}

static int synced(int fd, const char *name) {
    struct faults faults = of(fd);
    struct timespec wait = {faults.sync_ms / 1000, faults.sync_ms % 1000 * 1000000L};
    nanosleep(&wait, NULL);
    if (faults.sync_errno) {
        errno = faults.sync_errno;
        return -1;
    }
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(fd);
}

int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }

static ssize_t written(int fd, const void *data, size_t length, off_t offset) {
    struct faults faults = of(fd);
    if (faults.write_errno) {
        errno = faults.write_errno;
        return -1;
    }
    ssize_t (*real)(int, const void *, size_t, off_t) = (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    return real(fd, data, length, offset);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return written(fd, data, length, offset); }
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) { return written(fd, data, length, offset); }
