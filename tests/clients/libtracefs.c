/*
 * What libtracefs does with a tracefs, function by function: a client of its own, as the library's unit tests are in
 * Debian's source package alone. Prints a line for each check; the exit status is 1 if one has failed.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tracefs.h>
#include <unistd.h>

static int failed;

static void check(const char *what, bool well)
{
	printf("%s %s\n", well ? "ok   " : "FAIL ", what);
	failed |= !well;
}

static bool has(char **list, const char *name)
{
	while (list && *list && strcmp(*list, name))
		list++;
	return list && *list;
}

/* Is a text in a file of the instance? */
static bool shows(struct tracefs_instance *instance, const char *file, const char *text)
{
	char *content = tracefs_instance_file_read(instance, file, NULL);
	bool found = content && strstr(content, text);

	free(content);
	return found;
}

static void make_opens(int count)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/tracing_on", tracefs_tracing_dir());
	while (count--)
		close(open(path, O_RDONLY));
}

static int count_hits(struct tep_event *event, struct tep_record *record, int cpu, void *context)
{
	(void)event;
	*(int *)context += record->size > 0 && cpu == 0;
	return 0;
}

static void places(void)
{
	char **list;

	check("the tracing directory", !strcmp(tracefs_tracing_dir(), "/sys/kernel/tracing"));
	check("nothing is mounted for it", tracefs_tracing_dir_is_mounted(false, NULL) == 1);
	list = tracefs_event_systems(NULL);
	check("event systems", has(list, "sched") && has(list, "syscalls"));
	tracefs_list_free(list);
	list = tracefs_system_events(NULL, "sched");
	check("events of a system", has(list, "sched_switch"));
	tracefs_list_free(list);
	list = tracefs_tracers(NULL);
	check("tracers", has(list, "function") && has(list, "function_graph"));
	tracefs_list_free(list);
	check("clock", !strcmp(tracefs_get_clock(NULL), "local"));
	check("files", tracefs_file_exists(NULL, "trace") && !tracefs_file_exists(NULL, "nothing") &&
		       tracefs_dir_exists(NULL, "events"));
}

static void instances(struct tracefs_instance *instance)
{
	cpu_set_t set;

	check("a new instance", tracefs_instance_is_new(instance) && tracefs_instance_exists("library"));
	check("its tracing_on", tracefs_trace_off(instance) == 0 && tracefs_trace_is_on(instance) == 0 &&
				tracefs_trace_is_on(NULL) == 1 && tracefs_trace_on(instance) == 0);
	check("its buffer", tracefs_instance_set_buffer_size(instance, 64, -1) == 0 &&
			    tracefs_instance_get_buffer_size(instance, 0) >= 64);
	CPU_ZERO(&set);
	CPU_SET(0, &set);
	check("its CPUs", tracefs_instance_set_affinity_set(instance, &set, sizeof(set)) > 0 &&
			  !strcmp(tracefs_instance_get_affinity(instance), "0"));
	check("options", tracefs_option_enable(instance, TRACEFS_OPTION_SYM_OFFSET) == 0 &&
			 tracefs_option_is_enabled(instance, TRACEFS_OPTION_SYM_OFFSET) &&
			 tracefs_option_disable(instance, TRACEFS_OPTION_SYM_OFFSET) == 0 &&
			 !tracefs_option_is_enabled(instance, TRACEFS_OPTION_SYM_OFFSET));
	check("a marker", tracefs_print_init(instance) == 0 && tracefs_printf(instance, "hello %d", 42) == 0 &&
			  shows(instance, "trace", "hello 42"));
	tracefs_print_close(instance);
}

static void events(struct tracefs_instance *instance, struct tep_handle *tep)
{
	struct tracefs_dynevent *probe = tracefs_kprobe_alloc("library", "opened", "vfs_open", "flags=+0(%si):u32");
	struct tracefs_dynevent *wrong = tracefs_kprobe_alloc("library", "wrong", "vfs_open", "flags=%nothing");
	int hits = 0, left = 0;
	char *error;

	check("an event", tracefs_event_enable(instance, "sched", "sched_switch") == 0 &&
			  tracefs_event_is_enabled(instance, "sched", "sched_switch") == TRACEFS_ALL_ENABLED &&
			  tracefs_event_disable(instance, "sched", "sched_switch") == 0 &&
			  tracefs_event_is_enabled(instance, "sched", "sched_switch") == TRACEFS_ALL_DISABLED);
	check("a kprobe", tracefs_dynevent_create(probe) == 0 && shows(NULL, "dynamic_events", "p:library/opened"));
	error = tracefs_dynevent_create(wrong) ? tracefs_error_last(NULL) : NULL;
	check("an error", error && strstr(error, "Invalid"));
	free(error);
	tracefs_instance_file_clear(instance, "trace");
	tracefs_event_enable(instance, "library", "opened");
	make_opens(5);
	tracefs_event_disable(instance, "library", "opened");
	tracefs_fill_local_events(tracefs_tracing_dir(), tep, NULL);
	tracefs_iterate_raw_events(tep, instance, NULL, 0, count_hits, &hits);
	check("its hits, from trace_pipe_raw", hits >= 5);
	tracefs_iterate_raw_events(tep, instance, NULL, 0, count_hits, &left);
	check("which are consumed", left == 0);
	tracefs_event_file_write(instance, "library", "opened", "filter", "flags == 12345");
	check("a filter", shows(instance, "events/library/opened/filter", "flags == 12345"));
	check("without it", tracefs_event_file_write(instance, "library", "opened", "filter", "0") > 0 &&
			    shows(instance, "events/library/opened/filter", "none"));
	check("no more kprobe", tracefs_dynevent_destroy(probe, true) == 0 && !shows(NULL, "dynamic_events", "library/"));
	tracefs_dynevent_free(probe);
	tracefs_dynevent_free(wrong);
}

static void tracers(struct tracefs_instance *instance)
{
	check("a filter of functions", tracefs_function_filter(instance, "^vfs_open$", NULL, TRACEFS_FL_RESET) == 0 &&
				       shows(instance, "set_ftrace_filter", "vfs_open\n"));
	check("the function tracer", tracefs_tracer_set(instance, TRACEFS_TRACER_FUNCTION) == 0);
	make_opens(3);
	check("its lines", shows(instance, "trace", "vfs_open <-"));
	check("no tracer", tracefs_tracer_clear(instance) == 0 && shows(instance, "current_tracer", "nop"));
	check("no filter", tracefs_function_filter(instance, NULL, NULL, TRACEFS_FL_RESET) == 0);
}

static void histograms(struct tracefs_instance *instance, struct tep_handle *tep)
{
	struct tracefs_hist *hist = tracefs_hist_alloc(tep, "sched", "sched_switch", "next_comm", TRACEFS_HIST_KEY_NORMAL);
	struct tracefs_synth *synth = tracefs_sql(tep, "wakeups",
		"SELECT (e.TIMESTAMP_USECS - s.TIMESTAMP_USECS) AS lat, e.next_pid FROM sched_waking AS s "
		"JOIN sched_switch AS e ON s.pid = e.next_pid", NULL);

	check("a histogram", hist && tracefs_hist_start(instance, hist) == 0);
	usleep(20000);
	make_opens(3);
	check("its content", shows(instance, "events/sched/sched_switch/hist", "next_comm:"));
	check("paused", tracefs_hist_pause(instance, hist) == 0 &&
			shows(instance, "events/sched/sched_switch/trigger", "[paused]"));
	check("destroyed", tracefs_hist_destroy(instance, hist) == 0);
	check("SQL for a synthetic event", synth && tracefs_synth_create(synth) == 0 &&
					   shows(NULL, "synthetic_events", "wakeups"));
	check("and its end", synth && tracefs_synth_destroy(synth) == 0 && !shows(NULL, "synthetic_events", "wakeups"));
	tracefs_hist_free(hist);
	tracefs_synth_free(synth);
}

static void raw_pages(struct tracefs_instance *instance)
{
	struct tracefs_cpu *cpu;
	char page[65536];
	int fd = open("pages", O_RDWR | O_CREAT | O_TRUNC, 0600), got;

	tracefs_instance_file_clear(instance, "trace");
	tracefs_printf(instance, "first");
	cpu = tracefs_cpu_open(instance, 0, true);
	got = cpu ? tracefs_cpu_read(cpu, page, true) : -1;
	check("a page, by read", got > 0 && memmem(page, got, "first", 5));
	tracefs_printf(instance, "second");
	got = cpu ? tracefs_cpu_write(cpu, fd, true) : -1;
	got = got < 0 ? got : pread(fd, page, sizeof(page), 0);
	check("another, by splice", got > 0 && memmem(page, got, "second", 6));
	close(fd);
	tracefs_print_close(instance);
	if (cpu)
		tracefs_cpu_close(cpu);
}

int main(void)
{
	const char *systems[] = { "sched", NULL };
	struct tep_handle *tep = tracefs_local_events_system(NULL, systems);
	struct tracefs_instance *instance = tracefs_instance_create("library");

	if (!tep || !instance) {
		perror("libtracefs");
		return 1;
	}
	places();
	instances(instance);
	events(instance, tep);
	tracers(instance);
	histograms(instance, tep);
	raw_pages(instance);
	check("no more instance", tracefs_instance_destroy(instance) == 0 && !tracefs_instance_exists("library"));
	tracefs_instance_free(instance);
	tep_free(tep);
	return failed;
}
