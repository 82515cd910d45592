// Shares work among the threads of the process's OpenMP.

// Its function GOMP_parallel: runs a function on so many threads, and waits.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

template <class Function>
static void share(int64_t count, int64_t each, Parallel parallel, unsigned threads, const Function& function) {
    struct Job {
        std::atomic<int64_t> next;
        int64_t count, each;
        const Function& function;
    } job = {{0}, count, each, function};
    const auto run = [](void* data) {
        Job& job = *(Job*)data;
        for (int64_t begin; (begin = job.next.fetch_add(job.each)) < job.count;)
            job.function(begin, begin + job.each < job.count ? begin + job.each : job.count);
    };
    if (parallel && threads > 1 && count > each) parallel(run, &job, threads, 0);
    else run(&job);
}
