// Preloaded into a process, makes its wall clock fast by the seconds in the file named by WALL_CLOCK_OFFSET, read at
// every look. All other clocks are the machine's.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    const char *file = getenv("WALL_CLOCK_OFFSET");
    char text[32] = "";
    int before = errno;
    int opened = file ? open(file, O_RDONLY | O_CLOEXEC) : -1;
    if (opened >= 0) {
        // What cannot be read counts as none.
        if (read(opened, text, sizeof text - 1) < 0)
            text[0] = '\0';
        close(opened);
    }
    errno = before;
    return atol(text);
}

int clock_gettime(clockid_t id, struct timespec *now) {
    // Not by the C library's own function, which this one is put before.
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *restrict told, void *restrict zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now))
        return -1;
    told->tv_sec = now.tv_sec;
    told->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *told) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now))
        return (time_t)-1;
    if (told)
        *told = now.tv_sec;
    return now.tv_sec;
}
