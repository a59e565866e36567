package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
)

func (a *app) usersCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "users",
		Short: "Look after those who may use the server from elsewhere",
		Long: `Look after those who may use the server from elsewhere. 'violin token create --user NAME'
lets somebody log in.`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(a.usersListCommand(), a.usersRemoveCommand())
	return cmd
}

func (a *app) usersListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List who has logged in",
		Long: `List who has logged in and was not removed since. CERTIFICATES are those that are good, one
for each login; OPEN counts connections, and SLICES are the user's own.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := find(cmd.Context(), a, violinv1connect.NewUserServiceClient)
			if err != nil {
				return err
			}
			list, err := c.ListUsers(cmd.Context(), &violinv1.ListUsersRequest{})
			if err != nil {
				return err
			}
			if len(list.GetUsers()) == 0 {
				a.note("nobody has logged in; 'violin token create --user NAME' lets somebody do it")
			}
			return a.print(list, func(w io.Writer) {
				if len(list.GetUsers()) == 0 {
					return
				}
				t := newTable("USER", "ROLE", ">CERTIFICATES", "UNTIL", ">OPEN", "SLICES")
				for _, u := range list.GetUsers() {
					t.row(u.GetUser().GetName(), roleName(u.GetUser().GetRole()), fmt.Sprint(u.GetCertificates()), a.formatTime(u.GetExpires()),
						fmt.Sprint(u.GetConnections()), strings.Join(u.GetSlices(), " "))
				}
				t.write(w)
			})
		},
	}
}

func (a *app) usersRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm USER",
		Short: "Put a user out",
		Long: `Put a user out, at once: connections are cut, and certificates and tokens that were made
before are good no more. The user's slices run on, and stay those of a user of that
name: 'violin give' makes them another's.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := find(cmd.Context(), a, violinv1connect.NewUserServiceClient)
			if err != nil {
				return err
			}
			r, err := c.RemoveUser(cmd.Context(), &violinv1.RemoveUserRequest{Name: args[0]})
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { fmt.Fprintf(w, "%s put out\n", args[0]) })
		},
	}
}

func (a *app) giveCommand() *cobra.Command {
	var operators bool
	cmd := &cobra.Command{
		Use:   "give SLICE USER | SLICE --operators",
		Short: "Make a user the owner of a slice and its snapshots",
		Long: `Make a user the owner of a slice: of what runs by its name, and of its snapshots. With
--operators it is nobody's but the operators', as what is started on the server's own
machine is.`,
		Args: func(_ *cobra.Command, args []string) error {
			if want := map[bool]int{false: 2, true: 1}[operators]; len(args) != want {
				return fmt.Errorf("give takes a slice and a user, or a slice and --operators; %d given", len(args))
			}
			return nil
		},
		ValidArgsFunction: a.completion(sliceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := find(cmd.Context(), a, violinv1connect.NewUserServiceClient)
			if err != nil {
				return err
			}
			request := &violinv1.GiveSliceRequest{Slice: args[0]}
			if !operators {
				request.User = args[1]
			}
			r, err := c.GiveSlice(cmd.Context(), request)
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				if operators {
					fmt.Fprintf(w, "%s is the operators'\n", args[0])
					return
				}
				fmt.Fprintf(w, "%s is %s's\n", args[0], args[1])
			})
		},
	}
	cmd.Flags().BoolVar(&operators, "operators", false, "it is to be nobody's but the operators'")
	return cmd
}
