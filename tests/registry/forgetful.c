/* A disk that forgets: after every fsync of a file its content, as it then is, is copied to FORGETFUL/<inode>, and after
   every fsync of a folder "inode name" of each of its entries is written to FORGETFUL/<inode>.names. Whatever is not there
   when the machine "loses power" was never written. Loaded with LD_PRELOAD. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static void note(int fd) {
    const char *place = getenv("FORGETFUL");
    struct stat about;
    char name[4096], part[4200], buffer[65536];
    if (!place || fstat(fd, &about) != 0) return;
    if (S_ISREG(about.st_mode)) {
        snprintf(name, sizeof name, "%s/%llu", place, (unsigned long long)about.st_ino);
        snprintf(part, sizeof part, "%s.%d.part", name, (int)getpid());
        char own[64];
        snprintf(own, sizeof own, "/proc/self/fd/%d", fd);
        int in = open(own, O_RDONLY), out = open(part, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        off_t at = 0;
        ssize_t got;
        if (in >= 0 && out >= 0)
            while ((got = pread(in, buffer, sizeof buffer, at)) > 0) {
                if (write(out, buffer, got) != got) break;
                at += got;
            }
        if (in >= 0) close(in);
        if (out >= 0) close(out);
        rename(part, name);
    }
    if (S_ISDIR(about.st_mode)) {
        char own[64];
        snprintf(own, sizeof own, "/proc/self/fd/%d", fd);
        snprintf(name, sizeof name, "%s/%llu.names", place, (unsigned long long)about.st_ino);
        snprintf(part, sizeof part, "%s.%d.part", name, (int)getpid());
        DIR *folder = opendir(own);
        FILE *file = fopen(part, "w");
        struct dirent *entry;
        if (folder && file)
            while ((entry = readdir(folder)))
                fprintf(file, "%llu %s\n", (unsigned long long)entry->d_ino, entry->d_name);
        if (folder) closedir(folder);
        if (file) fclose(file);
        rename(part, name);
    }
}

int fsync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    int result = real(fd);
    if (result == 0) note(fd);
    return result;
}

int fdatasync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    int result = real(fd);
    if (result == 0) note(fd);
    return result;
}
