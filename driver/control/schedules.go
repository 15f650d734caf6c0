package control

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// ScheduleBackend is about when snapshots are made and which are kept. A target is
// POOL, for all volumes of a pool, or POOL/VOLUME. Called like the other methods
// of Backend.
type ScheduleBackend interface {
	Schedules(ctx context.Context) ([]Schedule, error)
	Schedule(ctx context.Context, target string) (Schedule, error)
	SetSchedule(ctx context.Context, target string, req SetSchedule) (Schedule, error)
	// DeleteSchedule leaves the snapshots that there are.
	DeleteSchedule(ctx context.Context, target string) error
}

// Schedule is the schedule of a pool's volumes, or of one volume instead of its
// pool's.
type Schedule struct {
	Target  string            `json:"target"` // POOL or POOL/VOLUME
	Rules   []string          `json:"rules"`  // none: no snapshots
	Zone    string            `json:"zone"`   // time zone of the rules; empty: the daemon's host's
	Since   time.Time         `json:"since"`
	Volumes []ScheduledVolume `json:"volumes"` // that follow it
}

// ScheduledVolume is how a volume does with its schedule.
type ScheduledVolume struct {
	Name     string    `json:"name"` // POOL/VOLUME
	Last     string    `json:"last,omitempty"`
	LastTime time.Time `json:"last_time,omitzero"`   // when that snapshot was made
	Next     time.Time `json:"next,omitzero"`        // when the next one is due
	Missed   []Missed  `json:"missed,omitempty"`     // the last time that any were
	MissedAt time.Time `json:"missed_time,omitzero"` // when that was found
	Held     []string  `json:"held,omitempty"`       // to be deleted, but read by clones
	Error    string    `json:"error,omitempty"`      // why what is due is not done
}

// Missed are snapshots that a rule wanted and that were not made.
type Missed struct {
	Rule  string    `json:"rule"`
	Count int       `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}

// SetSchedule asks for a schedule, instead of the one that there is. Rules are
// written as in package schedule; a volume's without rules has no snapshots made
// although its pool has a schedule.
type SetSchedule struct {
	Rules []string `json:"rules"`
	Zone  string   `json:"zone,omitempty"`
}

func scheduleTarget(r *http.Request) string {
	if name := r.PathValue("name"); name != "" {
		return r.PathValue("pool") + "/" + name
	}
	return r.PathValue("pool")
}

func (s *Server) listSchedules(r *http.Request) (int, any, error) {
	list, err := s.backend.Schedules(r.Context())
	return http.StatusOK, list, err
}

func (s *Server) showSchedule(r *http.Request) (int, any, error) {
	sched, err := s.backend.Schedule(r.Context(), scheduleTarget(r))
	return http.StatusOK, sched, err
}

func (s *Server) setSchedule(r *http.Request) (int, any, error) {
	var req SetSchedule
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	sched, err := s.backend.SetSchedule(r.Context(), scheduleTarget(r), req)
	return http.StatusOK, sched, err
}

func (s *Server) deleteSchedule(r *http.Request) (int, any, error) {
	return http.StatusNoContent, nil, s.backend.DeleteSchedule(r.Context(), scheduleTarget(r))
}

func schedulePath(target string) string {
	pool, volume, found := strings.Cut(target, "/")
	path := "/v1/schedules/" + url.PathEscape(pool)
	if found {
		path += "/" + url.PathEscape(volume)
	}
	return path
}

// Schedules lists all schedules.
func (c *Client) Schedules(ctx context.Context) (list []Schedule, err error) {
	return list, c.call(ctx, http.MethodGet, "/v1/schedules", nil, &list)
}

// Schedule returns the schedule of a pool (POOL) or of a volume (POOL/VOLUME).
func (c *Client) Schedule(ctx context.Context, target string) (s Schedule, err error) {
	return s, c.call(ctx, http.MethodGet, schedulePath(target), nil, &s)
}

// SetSchedule sets the schedule of a pool or volume.
func (c *Client) SetSchedule(ctx context.Context, target string, req SetSchedule) (s Schedule, err error) {
	return s, c.call(ctx, http.MethodPost, schedulePath(target), req, &s)
}

// DeleteSchedule removes the schedule of a pool or volume.
func (c *Client) DeleteSchedule(ctx context.Context, target string) error {
	return c.call(ctx, http.MethodDelete, schedulePath(target), nil, nil)
}
