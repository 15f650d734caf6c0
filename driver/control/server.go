package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/rs/zerolog"
)

// Backend is what the server asks of its daemon. All methods are called from the
// goroutine of a request or a job and may block; errors carry an *Error where
// the code matters. Volume names are POOL/VOLUME, not yet validated.
type Backend interface {
	Status(ctx context.Context) (Status, error)

	Pools(ctx context.Context) ([]Pool, error)
	Pool(ctx context.Context, name string) (Pool, error)
	CreatePool(ctx context.Context, req CreatePool) (Pool, error)
	DeletePool(ctx context.Context, name string) error

	// Volumes lists the volumes of a pool, all if pool is empty.
	Volumes(ctx context.Context, pool string) ([]Volume, error)
	Volume(ctx context.Context, name string) (Volume, error)
	CreateVolume(ctx context.Context, req CreateVolume) (Volume, error)
	// ResizeVolume fails with CodeNeedsForce if something would be lost.
	ResizeVolume(ctx context.Context, name string, size uint64, force bool) (Volume, error)
	Stats(ctx context.Context, name string) (VolumeStats, error)

	// CheckDelete refuses a deletion that could not even begin (no such volume, in
	// use), so that the client learns it from the request and not from the job.
	CheckDelete(ctx context.Context, name string, force bool) error
	DeleteVolume(ctx context.Context, name string, force bool, p Progress) error
	CheckVolume(ctx context.Context, name string, p Progress) (CheckReport, error)

	SettingsBackend
	SnapshotBackend
	ScheduleBackend
	ObjectBackend
	HoldBackend
}

// Server answers the control API. Its goroutines: one per connection
// (net/http) and one per running job.
type Server struct {
	backend Backend
	jobs    *jobTable
	log     zerolog.Logger
	http    http.Server
	ending  context.Context // Close has been called
	end     context.CancelFunc
}

// NewServer returns a server for backend; metrics, if not nil, answers /metrics.
func NewServer(backend Backend, metrics http.Handler, log zerolog.Logger) *Server {
	s := &Server{backend: backend, jobs: newJobTable(), log: log}
	s.ending, s.end = context.WithCancel(context.Background())
	s.http = http.Server{
		Handler:           s.routes(metrics),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	return s
}

// Serve answers connections of l until Close; it then returns nil.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("control: %w", err)
	}
	return nil
}

// Close cancels and awaits all jobs, ends holds, then lets the requests under way end
// until ctx does.
func (s *Server) Close(ctx context.Context) error {
	s.end()
	s.jobs.stop()
	if err := s.http.Shutdown(ctx); err != nil {
		return errors.Join(err, s.http.Close())
	}
	return nil
}

// handler is one route: what it returns becomes the body.
type handler func(r *http.Request) (status int, body any, err error)

func (s *Server) routes(metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	routes := map[string]handler{
		"GET /v1/status":                        s.status,
		"GET /v1/pools":                         s.listPools,
		"POST /v1/pools":                        s.createPool,
		"GET /v1/pools/{pool}":                  s.showPool,
		"DELETE /v1/pools/{pool}":               s.deletePool,
		"GET /v1/volumes":                       s.listVolumes,
		"POST /v1/volumes":                      s.createVolume,
		"GET /v1/volumes/{pool}/{name}":         s.showVolume,
		"GET /v1/volumes/{pool}/{name}/stats":   s.volumeStats,
		"POST /v1/volumes/{pool}/{name}/resize": s.resizeVolume,
		"POST /v1/volumes/{pool}/{name}/check":  s.checkVolume,
		"DELETE /v1/volumes/{pool}/{name}":      s.deleteVolume,
		"GET /v1/jobs":                          s.listJobs,
		"GET /v1/jobs/{id}":                     s.showJob,
		"DELETE /v1/jobs/{id}":                  s.cancelJob,
		"GET /v1/volumes/{pool}/{name}/limits":  s.volumeLimits,
		"POST /v1/volumes/{pool}/{name}/limits": s.limitVolume,
		"GET /v1/pools/{pool}/limits":           s.poolLimits,
		"POST /v1/pools/{pool}/limits":          s.limitPool,
		"POST /v1/volumes/{pool}/{name}/set":    s.setVolume,
		"POST /v1/volumes/{pool}/{name}/rename": s.renameVolume,
		"GET /v1/schedules":                     s.listSchedules,
		"GET /v1/schedules/{pool}":              s.showSchedule,
		"POST /v1/schedules/{pool}":             s.setSchedule,
		"DELETE /v1/schedules/{pool}":           s.deleteSchedule,
		"GET /v1/schedules/{pool}/{name}":       s.showSchedule,
		"POST /v1/schedules/{pool}/{name}":      s.setSchedule,
		"DELETE /v1/schedules/{pool}/{name}":    s.deleteSchedule,
	}
	maps.Copy(routes, s.snapshotRoutes())
	maps.Copy(routes, s.objectRoutes())
	for pattern, h := range routes {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, h) })
	}
	s.streamRoutes(mux)
	mux.HandleFunc("POST /v1/hold", s.hold)
	if metrics != nil {
		mux.Handle("GET /metrics", metrics)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, Errorf(CodeNotFound, "no such request: %s %s", r.Method, r.URL.Path))
	})
	return mux
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request, h handler) {
	if err := readBody(w, r); err != nil {
		s.fail(w, r, err)
		return
	}
	status, body, err := h(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if r.Method != http.MethodGet {
		s.log.Info().Str("method", r.Method).Str("path", r.URL.Path).Int("status", status).Msg("control request")
	}
	s.reply(w, status, body)
}

func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	e := &Error{Code: CodeOf(err), Message: err.Error()}
	event := s.log.Info()
	if e.Code == CodeFailed {
		event = s.log.Error()
	}
	event.Str("method", r.Method).Str("path", r.URL.Path).Str("code", string(e.Code)).Err(err).Msg("control request refused")
	s.reply(w, codeStatus[e.Code], map[string]*Error{"error": e})
}

func (s *Server) reply(w http.ResponseWriter, status int, body any) {
	if body == nil {
		w.WriteHeader(status)
		return
	}
	text, err := json.Marshal(body)
	if err != nil {
		s.log.Error().Err(err).Msg("control answer can't be written as JSON")
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	// The client knows the end of it without waiting for that of the handler.
	w.Header().Set("Content-Length", strconv.Itoa(len(text)+1))
	w.WriteHeader(status)
	if _, err := w.Write(append(text, '\n')); err != nil {
		s.log.Debug().Err(err).Msg("control client went away")
	}
}

// readBody replaces r.Body by its whole contents, read within bodyTimeout. A
// deadline on the connection itself would also end requests that wait for a job.
func readBody(w http.ResponseWriter, r *http.Request) error {
	const bodyTimeout = 30 * time.Second
	conn := http.NewResponseController(w)
	if err := conn.SetReadDeadline(time.Now().Add(bodyTimeout)); err != nil {
		return err
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBodyBytes))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return Errorf(CodeInvalid, "request body: larger than %d bytes", MaxBodyBytes)
	case err != nil:
		return Errorf(CodeInvalid, "request body: %v", err)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	return conn.SetReadDeadline(time.Time{})
}

// decode reads the one JSON object of a request's body.
func decode(r *http.Request, into any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	switch err := d.Decode(into); {
	case errors.Is(err, io.EOF):
		return Errorf(CodeInvalid, "request body: is empty, must be a JSON object")
	case err != nil:
		return Errorf(CodeInvalid, "request body: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Errorf(CodeInvalid, "request body: more follows the JSON object")
	}
	return nil
}

func volumeName(r *http.Request) string { return r.PathValue("pool") + "/" + r.PathValue("name") }

func (s *Server) status(r *http.Request) (int, any, error) {
	st, err := s.backend.Status(r.Context())
	return http.StatusOK, st, err
}

func (s *Server) listPools(r *http.Request) (int, any, error) {
	pools, err := s.backend.Pools(r.Context())
	return http.StatusOK, pools, err
}

func (s *Server) createPool(r *http.Request) (int, any, error) {
	var req CreatePool
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	p, err := s.backend.CreatePool(r.Context(), req)
	return http.StatusCreated, p, err
}

func (s *Server) showPool(r *http.Request) (int, any, error) {
	p, err := s.backend.Pool(r.Context(), r.PathValue("pool"))
	return http.StatusOK, p, err
}

func (s *Server) deletePool(r *http.Request) (int, any, error) {
	return http.StatusNoContent, nil, s.backend.DeletePool(r.Context(), r.PathValue("pool"))
}

func (s *Server) listVolumes(r *http.Request) (int, any, error) {
	volumes, err := s.backend.Volumes(r.Context(), r.URL.Query().Get("pool"))
	return http.StatusOK, volumes, err
}

func (s *Server) createVolume(r *http.Request) (int, any, error) {
	var req CreateVolume
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	v, err := s.backend.CreateVolume(r.Context(), req)
	return http.StatusCreated, v, err
}

func (s *Server) showVolume(r *http.Request) (int, any, error) {
	v, err := s.backend.Volume(r.Context(), volumeName(r))
	return http.StatusOK, v, err
}

func (s *Server) volumeStats(r *http.Request) (int, any, error) {
	st, err := s.backend.Stats(r.Context(), volumeName(r))
	return http.StatusOK, st, err
}

func (s *Server) resizeVolume(r *http.Request) (int, any, error) {
	var req ResizeVolume
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	v, err := s.backend.ResizeVolume(r.Context(), volumeName(r), req.Size, req.Force)
	return http.StatusOK, v, err
}

func (s *Server) checkVolume(r *http.Request) (int, any, error) {
	name := volumeName(r)
	if _, err := s.backend.Volume(r.Context(), name); err != nil {
		return 0, nil, err
	}
	j, err := s.jobs.start("check", name, func(ctx context.Context, p Progress) (*CheckReport, error) {
		report, err := s.backend.CheckVolume(ctx, name, p)
		if err != nil {
			return nil, err
		}
		return &report, nil
	})
	return http.StatusAccepted, j, err
}

func (s *Server) deleteVolume(r *http.Request) (int, any, error) {
	name := volumeName(r)
	force, err := flag(r, "force")
	if err == nil {
		err = s.backend.CheckDelete(r.Context(), name, force)
	}
	if err != nil {
		return 0, nil, err
	}
	j, err := s.jobs.start("delete", name, func(ctx context.Context, p Progress) (*CheckReport, error) {
		return nil, s.backend.DeleteVolume(ctx, name, force, p)
	})
	return http.StatusAccepted, j, err
}

func (s *Server) listJobs(*http.Request) (int, any, error) {
	return http.StatusOK, s.jobs.list(), nil
}

func (s *Server) showJob(r *http.Request) (int, any, error) {
	var wait time.Duration
	if q := r.URL.Query().Get("wait"); q != "" {
		seconds, err := strconv.ParseUint(q, 10, 16)
		if err != nil {
			return 0, nil, Errorf(CodeInvalid, "wait %q: must be a number of seconds up to %d", q, int(maxJobWait.Seconds()))
		}
		wait = time.Duration(seconds) * time.Second
	}
	j, err := s.jobs.wait(r.Context(), r.PathValue("id"), wait)
	return http.StatusOK, j, err
}

func (s *Server) cancelJob(r *http.Request) (int, any, error) {
	j, err := s.jobs.cancelJob(r.PathValue("id"))
	return http.StatusOK, j, err
}
