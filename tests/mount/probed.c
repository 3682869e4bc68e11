/*
 * What a program may do that the probes on its functions could disturb, or be disturbed by. Built and run by
 * test_mirror_uprobes.py, with probes and without: it must say the same.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define FUNCTION __attribute__((noinline, noipa))

static jmp_buf back;
extern char **environ;

FUNCTION int forks(int status)
{
	int pid = fork();

	return pid ? pid : -status;
}

FUNCTION void jumps(int n)
{
	if (n % 3 == 0)
		longjmp(back, n + 1);
}

FUNCTION double many(long a, long b, long c, long d, long e, long f, long g, long h, double x, double y)
{
	return (double)(a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h) * x + y;
}

FUNCTION long deep(long n)
{
	return n ? deep(n - 1) + n : 0;
}

FUNCTION long adds(long a, long b)
{
	return a + b;
}

static void *thread(void *argument)
{
	long sum = 0;

	for (long i = 0; i < 40; i++)
		sum = adds(sum, i * (long)argument);
	return (void *)sum;
}

static volatile long alarms, in_handler;

static void on_alarm(int signal)
{
	(void)signal;
	in_handler = adds(in_handler, 1);
	alarms++;
}

/* Returns when a line comes. */
FUNCTION int waits(int n)
{
	puts("waits");
	fflush(stdout);
	return getchar() == EOF ? -1 : n + 1;
}

static void nonsense(void)
{
	long numbers[] = { 0, 1, 2, -1, 1l << 47, 1l << 62, 4096, (long)numbers, (long)nonsense };

	for (unsigned i = 0; i < 9; i++)
		for (unsigned j = 0; j < 9; j++)
			if (syscall(0x0FA4EF5, j < 3 ? j : 1, numbers[i], numbers[j]) != -1 || errno != ENOSYS)
				printf("the call returned\n");
}

/* As if it were a trampoline that has saved any registers. */
static void hostile(void)
{
	static unsigned long saved[128];
	unsigned long places[] = { (unsigned long)adds, (unsigned long)deep, (unsigned long)hostile };

	srandom(1);
	for (unsigned long round = 0; round < 60; round++) {
		for (unsigned i = 0; i < 128; i++)
			saved[i] = (unsigned long)random() << (random() % 33);
		if (round % 3 == 0)
			memset(saved, 0xff, sizeof(saved));
		syscall(0x0FA4EF5, round % 4, saved, places[round % 3] + (round % 7 == 6));
		syscall(0x0FA4EF5, round % 4, (char *)saved - 256 + round % 5, places[round / 3 % 3]);
	}
	printf("deep %ld\n", deep(3));
}

int main(int argc, char **argv)
{
	int status = 0;
	long sum = 0;
	volatile int round;
	pthread_t threads[4];
	pid_t child;

	if (argc > 1 && !strcmp(argv[1], "wait"))
		return waits(atoi(argv[2]));
	if (argc > 1 && !strcmp(argv[1], "hostile")) {
		hostile();
		return 0;
	}
	for (int i = 1; i < 4; i++) {
		int pid = forks(i);
		if (pid <= 0)
			_exit(10 - pid);
		waitpid(pid, &status, 0);
		printf("child %d\n", WEXITSTATUS(status));
	}
	for (round = 0; round < 150; round++)
		if (!setjmp(back))
			jumps(round);
		else
			sum++;
	printf("jumps %ld\n", sum);
	printf("many %.3f\n", many(1, 2, 3, 4, 5, 6, 7, 8, 1.5, 0.25));
	printf("deep %ld\n", deep(200));
	for (long i = 0; i < 4; i++)
		pthread_create(&threads[i], NULL, thread, (void *)(i + 1));
	for (int i = 0; i < 4; i++) {
		void *result;
		pthread_join(threads[i], &result);
		printf("thread %ld\n", (long)result);
	}
	struct sigaction action = { .sa_handler = on_alarm };
	struct itimerval timer = { { 0, 2000 }, { 0, 2000 } }, none = { { 0, 0 }, { 0, 0 } };
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &timer, NULL);
	sum = 0;
	while (alarms < 10)
		sum = adds(sum, 1) & 0xff;
	setitimer(ITIMER_REAL, &none, NULL);
	printf("alarms %s\n", in_handler == alarms ? "counted" : "lost");
	nonsense();
	char *words[] = { "true", NULL };
	if (!posix_spawn(&child, "/bin/true", NULL, NULL, words, environ))
		waitpid(child, &status, 0);
	printf("spawned %d\n", status);
	if (!(child = vfork())) {
		adds(1, 2);
		_exit(7);
	}
	waitpid(child, &status, 0);
	printf("vforked %d\n", WEXITSTATUS(status));
	fflush(stdout);
	return (int)adds(20, 3);
}
